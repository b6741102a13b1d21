"""Estimates a training run: parameters, FLOPs, memory, hours, and on which GPUs it fits.

    python -m minillm.plan --preset base --max_seq_len 2048 --batch_size 8
    python -m minillm.plan --preset base --ranks 8 --gpus 4090,A100-80 --json

Nothing is allocated: the model has shapes but no memory.
"""

import json

from minillm.cli.command_line import parse, script
from minillm.plan.arguments import PlanArguments
from minillm.plan.report import make_plan
from minillm.plan.text import format_plan


@script
def main(argv: list[str] | None = None) -> dict:
    """Print the plan; return its figures."""
    args = parse(PlanArguments, argv)
    plan = make_plan(args)
    print(json.dumps(plan, indent=2) if args.json else format_plan(plan))
    return plan


if __name__ == "__main__":
    main()
