"""What torch's allocator gave out, by its own profiler."""

import torch


def peak_of_allocations(f):
    """The most bytes that torch's allocator held during f, above those at its start."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        f()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = held = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
