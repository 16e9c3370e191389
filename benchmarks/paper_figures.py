"""The figures that the paper publishes (Tables 3 to 5), to stand beside what is measured here.

They are of other models (7B and 8B) on Nvidia A100 GPUs, with twice the inference rows and with demonstrations of its
own; only the pattern between the methods can be compared.
"""

from __future__ import annotations

TASKS = ("CoNaLa", "IA32", "TLDR")
METRICS = ("Exact Match", "edit similarity", "BLEU", "ROUGE")
MODELS = ("CodeLlama-7B", "StarCoder2-7B", "OpenCoder-8B")

# Table 3: by model and method, a row for each of METRICS with a column for each of TASKS
EFFECTIVENESS: dict[str, dict[str, tuple[tuple[float, float, float], ...]]] = {
    "CodeLlama-7B": {
        "unpatched": ((0.766, 0.820, 0.557), (0.819, 0.881, 0.635), (0.662, 0.689, 0.445), (0.761, 0.836, 0.534)),
        "MINT, single": ((0.825, 0.858, 0.657), (0.861, 0.905, 0.710), (0.741, 0.755, 0.559), (0.813, 0.871, 0.624)),
        "STAR, single": ((0.947, 0.914, 0.921), (0.964, 0.958, 0.932), (0.885, 0.832, 0.814), (0.952, 0.943, 0.925)),
        "SGD, multiple": ((0.909, 0.816, 0.810), (0.933, 0.867, 0.831), (0.869, 0.713, 0.812), (0.914, 0.824, 0.802)),
        "STAR, multiple": ((0.949, 0.883, 0.946), (0.966, 0.931, 0.953), (0.907, 0.746, 0.895), (0.956, 0.898, 0.939)),
    },
    "StarCoder2-7B": {
        "unpatched": ((0.808, 0.924, 0.589), (0.844, 0.940, 0.662), (0.716, 0.932, 0.486), (0.803, 0.927, 0.566)),
        "MINT, single": ((0.893, 0.956, 0.727), (0.904, 0.964, 0.763), (0.833, 0.957, 0.641), (0.873, 0.963, 0.699)),
        "STAR, single": ((0.894, 0.971, 0.807), (0.917, 0.976, 0.835), (0.795, 0.956, 0.557), (0.897, 0.969, 0.810)),
        "SGD, multiple": ((0.951, 0.930, 0.949), (0.964, 0.946, 0.956), (0.918, 0.881, 0.899), (0.959, 0.931, 0.953)),
        "STAR, multiple": ((0.993, 1.000, 0.990), (0.995, 1.000, 0.992), (0.985, 0.999, 0.972), (0.994, 1.000, 0.990)),
    },
    "OpenCoder-8B": {
        "unpatched": ((0.713, 0.870, 0.546), (0.822, 0.924, 0.673), (0.715, 0.909, 0.505), (0.792, 0.909, 0.588)),
        "MINT, single": ((0.798, 0.902, 0.675), (0.873, 0.946, 0.760), (0.789, 0.933, 0.630), (0.850, 0.941, 0.694)),
        "STAR, single": ((0.950, 0.990, 0.920), (0.962, 0.994, 0.938), (0.918, 0.984, 0.828), (0.956, 0.989, 0.924)),
        "SGD, multiple": ((0.997, 1.000, 0.998), (0.998, 1.000, 0.998), (0.996, 1.000, 0.998), (0.999, 1.000, 0.996)),
        "STAR, multiple": ((0.997, 0.998, 0.998), (0.998, 1.000, 0.998), (0.997, 1.000, 0.999), (0.999, 1.000, 0.996)),
    },
}

# Table 4: seconds to solve a failure, by model and method, a column for each of TASKS
SECONDS: dict[str, dict[str, tuple[float, float, float]]] = {
    "CodeLlama-7B": {
        "MINT, single": (3.124, 2.672, 3.668),
        "STAR, single": (1.205, 1.061, 1.430),
        "SGD, multiple": (0.307, 0.379, 0.284),
        "STAR, multiple": (0.453, 0.585, 0.457),
    },
    "StarCoder2-7B": {
        "MINT, single": (2.072, 0.593, 3.416),
        "STAR, single": (1.493, 0.456, 1.760),
        "SGD, multiple": (0.348, 0.451, 0.329),
        "STAR, multiple": (0.590, 0.927, 0.620),
    },
    "OpenCoder-8B": {
        "MINT, single": (3.247, 1.004, 4.324),
        "STAR, single": (1.217, 0.620, 1.625),
        "SGD, multiple": (0.353, 0.452, 0.326),
        "STAR, multiple": (0.555, 0.979, 0.554),
    },
}

# Table 5: by model and method G, S and GSH, each as (MAE, RMSE)
SIDE_EFFECTS: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {
    "CodeLlama-7B": {
        "MINT": ((0.007, 0.081), (0.993, 0.919), (0.014, 0.149)),
        "SGD": ((0.988, 0.990), (0.039, 0.030), (0.075, 0.058)),
        "STAR": ((0.925, 0.954), (0.114, 0.069), (0.203, 0.129)),
        "STAR[layer]": ((0.459, 0.614), (0.586, 0.426), (0.515, 0.503)),
        "STAR[neuron]": ((0.011, 0.063), (0.987, 0.944), (0.022, 0.118)),
    },
    "StarCoder2-7B": {
        "MINT": ((0.000, 0.000), (1.000, 1.000), (0.000, 0.000)),
        "SGD": ((0.959, 0.971), (0.336, 0.261), (0.498, 0.411)),
        "STAR": ((0.929, 0.952), (0.683, 0.510), (0.787, 0.664)),
        "STAR[layer]": ((0.836, 0.897), (0.739, 0.563), (0.785, 0.692)),
        "STAR[neuron]": ((0.017, 0.052), (0.978, 0.943), (0.033, 0.099)),
    },
    "OpenCoder-8B": {
        "MINT": ((0.001, 0.027), (1.000, 0.999), (0.002, 0.053)),
        "SGD": ((0.904, 0.928), (0.525, 0.429), (0.664, 0.587)),
        "STAR": ((0.378, 0.555), (0.891, 0.754), (0.531, 0.639)),
        "STAR[layer]": ((0.054, 0.126), (0.971, 0.913), (0.102, 0.221)),
        "STAR[neuron]": ((0.006, 0.014), (0.996, 0.986), (0.012, 0.028)),
    },
}


def effectiveness_table() -> str:
    """Table 3 as Markdown: a row for each model and method, a column for each metric, the tasks side by side."""
    lines = ["| model | method | " + " | ".join(f"{metric} ({', '.join(TASKS)})" for metric in METRICS) + " |"]
    lines.append("| --- " * (2 + len(METRICS)) + "|")
    for model, methods in EFFECTIVENESS.items():
        for method, metrics in methods.items():
            cells = [", ".join(f"{value:.3f}" for value in row) for row in metrics]
            lines.append(f"| {model} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_table() -> str:
    """Table 4 as Markdown."""
    lines = [f"| model | method | {' | '.join(TASKS)} | mean |", "| --- " * (3 + len(TASKS)) + "|"]
    for model, methods in SECONDS.items():
        for method, seconds in methods.items():
            cells = " | ".join(f"{value:.3f}" for value in (*seconds, sum(seconds) / len(seconds)))
            lines.append(f"| {model} | {method} | {cells} |")
    return "\n".join(lines)


def side_effects_table() -> str:
    """Table 5 as Markdown."""
    names = [f"{name}, {error}" for name in ("G", "S", "GSH") for error in ("MAE", "RMSE")]
    lines = [f"| model | method | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for model, methods in SIDE_EFFECTS.items():
        for method, pairs in methods.items():
            cells = " | ".join(f"{value:.3f}" for pair in pairs for value in pair)
            lines.append(f"| {model} | {method} | {cells} |")
    return "\n".join(lines)
