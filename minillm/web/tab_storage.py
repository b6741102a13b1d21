"""Keeps a text in the browser tab (``sessionStorage``): it survives a reload, and no other tab sees it."""

import functools

from minillm.web import st

_SCRIPT = """
export default function({ data, setStateValue }) {
  const name = "minillm";
  try {
    if (data.text !== null) sessionStorage.setItem(name, data.text);
  } catch (error) {}  // full (about 5 MB), or forbidden: what is there stays
  let stored = "";
  try {
    stored = sessionStorage.getItem(name) ?? "";
  } catch (error) {}
  if (!data.is_loaded) setStateValue("stored", stored);
}
"""


def exchange(text: str | None, *, is_loaded: bool) -> str | None:
    """Store ``text`` (None: leave what is there); return what the tab held when the page was opened, None until known.

    Args:
        is_loaded: whether that is known already.
    """
    data = {"text": text, "is_loaded": is_loaded}
    return _component()(key="tab_storage", data=data, on_stored_change=lambda: None, height=1).stored


@functools.cache
def _component():
    return st.components.v2.component("minillm.tab_storage", js=_SCRIPT)
