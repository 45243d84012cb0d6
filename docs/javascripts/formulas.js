// Typeset what pymdownx.arithmatex marked: \( ... \) within a line, \[ ... \] on its own.
for (const formula of document.querySelectorAll(".arithmatex")) {
  const source = formula.textContent.trim();
  katex.render(source.slice(2, -2), formula, {
    displayMode: source.startsWith("\\["),
    throwOnError: false,
  });
}
