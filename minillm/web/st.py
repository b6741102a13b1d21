"""Streamlit, imported when a page asks for the first of its functions: ``from minillm.web import st``.

Importing minillm needs no optional package, so no module here may import streamlit when it is imported itself.
"""

from minillm.errors import missing_package


def __getattr__(name: str):
    try:
        import streamlit
    except ImportError:
        raise missing_package("streamlit", purpose="the web page", extra="web") from None
    return getattr(streamlit, name)
