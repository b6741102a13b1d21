"""Fixtures of other people's making: tokenizers, chat templates and models in layouts that are not ours."""
