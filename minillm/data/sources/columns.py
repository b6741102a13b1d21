"""``--columns``: other people's names for what a record is made of.

--columns prompt=question,completion=answer       left: our name; right: the file's
--columns messages=data.dialogue                  a dot leads into an object, where no key has the whole name
"""

from minillm.errors import UserError

CONVERSATIONS = ("conversations", "messages", "conversation")
QUESTIONS = ("instruction", "prompt", "query", "question", "input")
ANSWERS = ("output", "completion", "response", "answer")
PARTS = ("text", *CONVERSATIONS, *QUESTIONS, *ANSWERS, "chosen", "rejected")
"""The keys that a record can be made of."""
OURS = (*PARTS, "history", "system", "reasoning_content", "label", "log_prob", "kind", "task", "group", "final")


def parse_columns(columns: str) -> dict[str, str]:
    """Return {our name: the file's name} of a ``--columns`` text; empty where it says nothing.

    Raises:
        UserError: a part without ``=``, an unknown name of ours, or one that is given twice.
    """
    names: dict[str, str] = {}
    for part in filter(None, map(str.strip, columns.split(","))):
        ours, mark, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and mark and theirs):
            raise UserError(f"--columns {columns}: {part!r} is not OURS=THEIRS, as in prompt=question")
        if ours not in OURS:
            raise UserError(f"--columns {columns}: {ours!r} is not a name of ours; known: {', '.join(OURS)}")
        if ours in names:
            raise UserError(f"--columns {columns}: {ours!r} is given twice; one column can have that name")
        names[ours] = theirs
    return names


def rename_columns(value: dict, columns: dict[str, str]) -> dict:
    """Return a record under our names. Of the keys in ``PARTS`` only those that ``columns`` names are left.

    So it also chooses between two ways in which one record says something: ``--columns messages=messages`` reads the
    messages of a record that has a ``text`` too. Columns that name no part (``system=persona``) leave the parts alone.

    Raises:
        UserError: the record lacks one of the columns.
    """
    if not columns:
        return value
    chooses = any(name in PARTS for name in columns)
    renamed = {
        key: item for key, item in value.items() if key not in columns.values() and not (chooses and key in PARTS)
    }
    return renamed | {ours: _look_up(value, ours, theirs) for ours, theirs in columns.items()}


def _look_up(value: dict, ours: str, theirs: str):
    if theirs in value:
        return value[theirs]
    item = value
    for key in theirs.split("."):
        if not isinstance(item, dict) or key not in item:
            names = ", ".join(map(str, value))
            raise UserError(f"the record lacks a column: {theirs!r} of --columns {ours}={theirs}; it has {names}")
        item = item[key]
    return item
