"""Made-up runs: numbers of no experiment, written only below pytest's temporary folder."""

import json

from llqr_lab.protocols import resolve_settings

PROCESSOR = {"processor": "made up", "cores": 2, "python": "3.11", "torch": "2.13.0", "llqr": "0.1"}


def refresh(step, change=0.5, accepted=True):
    return {
        "step": step,
        "seconds": 0.1,
        "accepted": accepted,
        "reason": None if accepted else "J did not go down",
        "J_before": -1.0,
        "J_after": -1.5 if accepted else None,
        "gradient_norm": 1.0,
        "ratio": 1.1,
        "change": change,
        "cosine": 0.9,
        "eigenvalue_min": 0.25,
        "eigenvalue_max": 4.0,
        "products": 50,
    }


def settings_of(recipe, dataset, model, method, changes):
    found = {}
    for key, setting in resolve_settings(recipe, dataset, model, method).items():
        if key.partition(".")[0] not in ("search", "sweep", "report", "network"):
            value = setting.value
            found[key] = list(value) if isinstance(value, tuple) else value
    return {**found, **changes}


def write(root, folder, content):
    path = root / folder
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(content))
    return path


def run(root, folder, recipe, dataset, model, method, seed, best, *, change=0.5, **options):
    """Write a finished run of three epochs, the second the best."""
    changes = options.pop("changes", {})
    bleu = dataset == "IWSLT14"
    named = options.pop("named", recipe)  # another name for runs with a recipe's settings
    epochs = []
    for i, score in enumerate((best - 2, best, best - 1)):
        of_kind = (
            {"validation_loss": 3.0 - i, "bleu": score, "token_error": 60.0 - 5 * i}
            if bleu
            else {"test_loss": 1.0 - 0.2 * i, "test_accuracy": score}
        )
        times = {"epoch": i + 1, "step": 10 * (i + 1), "seconds": 5.0 * (i + 1)}
        times["elapsed_seconds"] = 6.0 * (i + 1)
        epochs.append({**times, "train_loss": 2.0 - i / 2, **of_kind})
    content = {
        "format": 1,
        "recipe": named,
        "scale": "paper",
        "dataset": dataset,
        "source": dataset,
        "model": model,
        "method": method,
        "noise": 0.0,
        "seed": seed,
        "settings": settings_of(recipe, dataset, model, method, changes),
        "changed": sorted(changes),
        "metric": "bleu" if bleu else "test_accuracy",
        "epochs": epochs,
        "best": best,
        "last": best - 1,
        "refreshes": [refresh(s, change) for s in (0, 10)] if "LLQR" in method else [],
        "skipped_steps": 0,
        "parameters": 1000,
        "processes": 1,
        "environment": PROCESSOR,
        "seconds": 15.0,
        "finished": "2026-11-25T03:00:00",
        **options,
    }
    return write(root, folder, content)


def timing(root, folder, model, method, every, epoch, update=None, **options):
    """Write a timing."""
    recipe = options.pop("recipe", "table10")
    dataset = "ImageNet-scale images"
    changes = {} if every in (None, 500) else {"llqr.every": every}
    content = {
        "format": 1,
        "recipe": recipe,
        "scale": "paper",
        "dataset": dataset,
        "source": dataset,
        "model": model,
        "method": method,
        "noise": 0.0,
        "seed": 0,
        "settings": settings_of(recipe, dataset, model, method, changes),
        "changed": sorted(changes),
        "metric": "epoch_seconds",
        "timing": {
            "every": every,
            "steps": 100,
            "step_seconds": 0.05,
            "first_refresh_seconds": 9.0,
            "update_seconds": update,
            "epoch_seconds": epoch + 1,
            "epoch_seconds_without": epoch,
            "steps_an_epoch": 782,
        },
        "parameters": 1000,
        "processes": 1,
        "environment": PROCESSOR,
        "seconds": 60.0,
        "finished": "2026-11-25T03:00:00",
        **options,
    }
    return write(root, folder, content)
