"""A server that speaks OpenAI's API: ``create_app(engine, ...)`` in ``app.py``, the program around it in ``server.py``."""

from minillm.serving.api.app import create_app

__all__ = ["create_app"]
