"""``--columns``: read a data file whose keys have other names than ours.

--columns prompt=question,completion=answer       left: our name; right: the file's
--columns messages=data.dialogue                  a dot leads into an object, unless a key has the whole name
"""

from minillm.errors import UserError

CONVERSATIONS = ("conversations", "messages", "conversation")
QUESTIONS = ("instruction", "prompt", "query", "question", "input")
ANSWERS = ("output", "completion", "response", "answer")
PARTS = ("text", *CONVERSATIONS, *QUESTIONS, *ANSWERS, "chosen", "rejected")
"""The keys that a record can be made of."""
OUR_NAMES = (*PARTS, "history", "system", "reasoning_content", "label", "log_prob", "kind", "task", "group", "final")


def parse_columns(columns: str) -> dict[str, str]:
    """Return {our name: the file's name} for the value of ``--columns``; empty for an empty value.

    Raises:
        UserError: a part without ``=``, an unknown name on the left, or the same one twice.
    """
    file_names: dict[str, str] = {}
    for part in filter(None, map(str.strip, columns.split(","))):
        our_name, equals_sign, file_name = (piece.strip() for piece in part.partition("="))
        if not (our_name and equals_sign and file_name):
            raise UserError(f"--columns {columns}: {part!r} is not OURS=THEIRS, as in prompt=question")
        if our_name not in OUR_NAMES:
            raise UserError(f"--columns {columns}: {our_name!r} is not a name of ours; known: {', '.join(OUR_NAMES)}")
        if our_name in file_names:
            raise UserError(f"--columns {columns}: {our_name!r} is given twice; only one column can have that name")
        file_names[our_name] = file_name
    return file_names


def rename_columns(value: dict, columns: dict[str, str]) -> dict:
    """Return a record under our names. If ``columns`` names a key of ``PARTS``, other keys of ``PARTS`` are dropped.

    So ``--columns`` also chooses between several contents of one record: ``messages=messages`` reads the messages of a
    record that has a ``text`` too. Columns that name no part (``system=persona``) keep all parts.

    Raises:
        UserError: the record lacks one of the columns.
    """
    if not columns:
        return value
    dropped_keys = set(columns.values())
    if any(our_name in PARTS for our_name in columns):
        dropped_keys |= set(PARTS)
    unchanged = {key: item for key, item in value.items() if key not in dropped_keys}
    return unchanged | {our_name: _look_up(value, our_name, file_name) for our_name, file_name in columns.items()}


def _look_up(value: dict, our_name: str, file_name: str):
    if file_name in value:
        return value[file_name]
    item = value
    for key in file_name.split("."):
        if not isinstance(item, dict) or key not in item:
            keys = ", ".join(map(str, value))
            raise UserError(
                f"the record lacks a column: {file_name!r} of --columns {our_name}={file_name}; its keys are {keys}"
            )
        item = item[key]
    return item
