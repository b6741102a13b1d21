"""A server that speaks OpenAI's API: ``create_app(engine, ...)``, and ``server.py`` to run it."""

from minillm.serving.api.app import create_app

__all__ = ["create_app"]
