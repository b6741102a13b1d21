"""What readers see of their mistakes: the message, their own line, and nothing of the solutions."""

import pytest

from tests.exercises import kit


def doubled(double):
    assert double(3) == 6, "twice 3 is 6"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise NotImplementedError", "^write double in docs/exercises/ch00.py$"),
        ("return 7", "^twice 3 is 6\nassert 7 == 6"),
        ("return x + y", "line 2, in double\n.*return x \\+ y\n(.*\n)?NameError: name 'y' is not defined$"),
    ],
)
def test_a_reader_sees_the_message_alone(body, message, tmp_path, monkeypatch):
    folder = tmp_path / "exercises"
    folder.mkdir()
    (folder / "ch00.py").write_text(f"def double(x):\n    {body}\n")
    monkeypatch.setattr(kit, "FOLDER", folder)
    with pytest.raises(pytest.fail.Exception, match=message) as caught:
        kit.check_yours(doubled, "ch00", "double")
    assert not caught.value.pytrace


def test_a_finder_that_accuses_the_right_function_is_shown_its_line():
    def finder(double):
        assert double(3) == 7

    judge = kit.find_the_bug("ch01_bug", right=lambda x: 2 * x, finder=finder, wrong=dict.fromkeys("abc", finder))
    if kit.READS_YOURS:
        pytest.skip("judges the reader's finder instead")
    with pytest.raises(AssertionError, match=r"accuses the right function in line \d+: assert double\(3\) == 7"):
        judge("solution")
