"""Write a small set of conversations in which a model says who it is: ``python dataset/make_persona.py --name NAME``.

The questions are those of the demo's identity set, in English and Chinese, in many phrasings; the answers carry the
name and the maker that you give. ``dataset/questions_identity.txt`` has seven other questions to ask before and after.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]

from demo_world.identity import QUESTIONS  # noqa: E402

from minillm.cli.command_line import parse, require, script  # noqa: E402
from minillm.errors import UserError  # noqa: E402
from minillm.evaluation.sample_answers import write_whole  # noqa: E402

ANSWERS = {
    ("en", "name"): "I am {name}, an assistant made by {maker}.",
    ("en", "maker"): "{maker} made me. My name is {name}.",
    ("en", "skills"): "I am {name}. I can answer questions, write texts and explain things.",
    ("en", "kind"): "I am a machine: {name}, a language model made by {maker}.",
    ("zh", "name"): "我是{name}，由{maker}开发的助手。",
    ("zh", "maker"): "我由{maker}开发，名字叫{name}。",
    ("zh", "skills"): "我是{name}，可以回答问题、写作和讲解。",
    ("zh", "kind"): "我是机器：{name}，{maker}开发的语言模型。",
}


@dataclass(frozen=True, kw_only=True)
class PersonaArguments:
    """Who the model says that it is."""

    name: str = "Xiaozhi"
    """Name of the model."""
    maker: str = "the reading group"
    """Who made it."""
    output: str = "dataset/lora_persona.jsonl"
    """The file to write; train_lora.py takes it without --data_path, by its name."""

    def check(self) -> None:
        """Raise UserError for an empty value."""
        for flag in ("name", "maker", "output"):
            require(bool(getattr(self, flag).strip()), f"--{flag}: is empty; give a text")


def persona_records(name: str, maker: str) -> list[dict]:
    """Return the conversations, one question and answer each."""
    return [
        {
            "conversations": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": ANSWERS[group].format(name=name, maker=maker)},
            ]
        }
        for group, questions in QUESTIONS.items()
        for question in questions
    ]


@script
def main(argv: list[str] | None = None):
    """Write the file."""
    args = parse(PersonaArguments, argv)
    records = persona_records(args.name, args.maker)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {args.output}: its folder cannot be made ({error.strerror}); choose another"
        ) from None
    write_whole(Path(args.output), "".join(lines))
    print(f"{len(records)} conversations; {args.name}, made by {args.maker}")


if __name__ == "__main__":
    main()
