"""Write the end of every command's help: examples, and where to read on."""

from __future__ import annotations

from anyflow.cli.common import help_end

_HUB = "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers"

MAIN = help_end(
    "sampling.md",
    "anyflow demo",
    f'anyflow sample --model {_HUB} --prompt "a red panda" --out videos',
    "anyflow train smoke_pretrain",
    "anyflow COMMAND --help",
)
EPILOGS = {
    "demo": help_end("training.md", "anyflow demo", "anyflow demo --budget fast --out runs/fast"),
    "report": help_end("training.md", "anyflow report runs/demo runs/demo-1 --out runs/report"),
    "sample": help_end(
        "sampling.md",
        f'anyflow sample --model {_HUB} --prompt "a red panda" --out videos',
        "anyflow sample --model model --prompts prompts.csv --steps 1,4 --seed 0,1 --out videos",
        'anyflow sample --model model --image first.png --prompt "it walks away" --out videos',
        "anyflow sample --model wan --euler --steps 50 --guidance 5 --prompt cat --out wan-videos",
        'anyflow sample --model far --stream --steps 8+2 --prompt "a red panda" --out far-videos',
    ),
    "evaluate": help_end(
        "evaluation.md",
        f"anyflow evaluate --model {_HUB} --prompts prompts.txt --steps 1,2,4,8,16,32 --out "
        "evaluation",
        "anyflow evaluate --model runs/demo --out runs/demo-evaluation",
        "torchrun --nproc-per-node 8 -m anyflow evaluate --model student=model --prompts "
        "prompts.txt --out evaluation",
        "anyflow evaluate --report-only evaluation",
    ),
    "train": help_end(
        "training.md",
        "anyflow train smoke_pretrain",
        "anyflow train anyflow_pretrain_t2v data.path=latents --print-config",
        "torchrun --nproc-per-node 8 -m anyflow train my_recipe.yaml",
    ),
    "recipes": help_end(
        "training.md",
        "anyflow recipes",
        "anyflow recipes --copy anyflow_pretrain_t2v my_recipe.yaml",
    ),
    "export": help_end("training.md", "anyflow export runs/smoke_pretrain model"),
    "preprocess": help_end(
        "training.md",
        f"anyflow preprocess --videos clips --captions clips.csv --model {_HUB} --out latents",
        "anyflow preprocess --out latents --verify",
    ),
    "inspect": help_end("sampling.md", "anyflow inspect model", f"anyflow inspect {_HUB}"),
    "convert": help_end(
        "sampling.md",
        "anyflow convert anyflow.pt model --lora-alpha 256 --shift 5",
        "anyflow convert wan flow-map --flow-map --dtype bfloat16",
    ),
    "verify": help_end(
        "sampling.md",
        "anyflow verify --model model",
        f"anyflow verify --model {_HUB} --dtype bfloat16 --device cuda",
    ),
    "doctor": help_end("sampling.md", "anyflow doctor", "anyflow doctor --json"),
}
