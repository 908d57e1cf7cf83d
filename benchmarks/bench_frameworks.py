"""Hugging Face and Lightning: a bundle in one Trainer against a Trainer for each model.

python benchmarks/bench_frameworks.py --rounds 3
"""

import argparse
import importlib.metadata

import frameworks_hf
import frameworks_lightning
from harness import save, show


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "lightning")}
    results: list[dict] = [{**versions, "rounds": args.rounds}]

    def note(workload: str, models: int, batch: int, result: dict) -> None:
        show(f"{workload}, M={models}, B={batch}, per step (ratios to the bundle)", result)
        results.append({"workload": workload, "models": models, "batch": batch, "variants": result})

    for models in (16, 1):
        bert = frameworks_hf.measure(models, args.rounds)
        workload = f"Hugging Face, BERT of {frameworks_hf.LAYERS} layers, d={frameworks_hf.WIDTH}"
        note(f"{workload}, T={frameworks_hf.LENGTH}", models, frameworks_hf.BATCH, bert)
    for models, widths in (
        (16, (20, 16, 16, 4)),
        (1, (20, 16, 16, 4)),
        (16, (784, 128, 10)),
        (1, (784, 128, 10)),
    ):
        mlp = frameworks_lightning.measure(models, widths, args.rounds)
        workload = f"Lightning, MLP {'-'.join(map(str, widths))}, Adam, clipping"
        note(workload, models, frameworks_lightning.BATCH, mlp)
    print(save("frameworks", results))


if __name__ == "__main__":
    main()
