"""Makes the pictures of the course with the library itself; no picture is drawn by hand.

    python docs/course/pictures.py                                 all pictures, into docs/pictures/course
    python docs/course/pictures.py attention dpo                   some of them
    python docs/course/pictures.py attention --save_dir out/demo   with the models of make demo, into out/demo/pictures

A picture is a file of ``figures/`` with ``compute``, which returns its numbers, and ``draw``, which draws them. Where a
real model shows more than a toy there is also ``from_demo``. Every picture is written for a light and a dark page.
"""

from pathlib import Path

import torch
import tyro
from figures import attention, cache, dpo, experts, lora, loss, packing, precision, rope, shapes, tokens, zero
from figures.style import THEMES, paths_of, rounded, svg

from minillm.errors import UserError, missing_package, script

FOLDER = Path(__file__).parents[1] / "pictures" / "course"
PICTURES = {
    "tokens": tokens, "packing": packing, "loss": loss, "attention": attention, "rope": rope, "cache": cache,
    "experts": experts, "shapes": shapes, "precision": precision, "zero": zero, "lora": lora, "dpo": dpo,
}  # fmt: skip
DEMO_RUNS = ("pretrain_128", "full_sft_128", "lora/identity_128", "rlhf_128")


def compute(name: str, save_dir: str = "") -> dict:
    """Return the numbers of a picture as they are drawn; ``save_dir``: of ``make demo``, or none."""
    torch.set_num_threads(1)  # the models are small: more threads would wait for one another
    module = PICTURES[name]
    return rounded(module.from_demo(Path(save_dir)) if save_dir else module.compute())


def write(name: str, numbers: dict, folder: Path) -> None:
    """Write a picture for each theme."""
    paths = paths_of(name, folder)
    for theme in THEMES:
        paths[theme.name].write_bytes(svg(PICTURES[name].draw, numbers, theme))


def pictures(names: tyro.conf.Positional[tuple[str, ...]] = (), *, save_dir: str = "", output: str = "") -> None:
    """Make pictures of the course.

    Args:
        names: of the pictures (default: all; with --save_dir all that a trained model has a part in).
        save_dir: what make demo has trained, such as out/demo (default: toys that are trained in seconds).
        output: directory of the pictures (default: docs/pictures/course, or pictures in --save_dir).
    """
    has_models = [name for name, module in PICTURES.items() if hasattr(module, "from_demo")]
    known = has_models if save_dir else list(PICTURES)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no picture is called {', '.join(unknown)}: choose from {', '.join(known)}")
    missing = [run for run in DEMO_RUNS if save_dir and not Path(save_dir, run).is_dir()]
    if missing:
        raise UserError(f"--save_dir {save_dir} has no {', '.join(missing)}; make demo writes out/demo")
    folder = Path(output) if output else Path(save_dir, "pictures") if save_dir else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or known:
        try:
            write(name, compute(name, save_dir), folder)
        except ImportError:
            raise missing_package("matplotlib", purpose="drawing") from None
        print(f"{name}: {folder}")


@script
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    tyro.cli(pictures, args=argv, use_underscores=True)


if __name__ == "__main__":
    main()
