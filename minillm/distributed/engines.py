"""Which engine a run has."""

from minillm.distributed.engine import Engine


def engine_class(name: str) -> type[Engine]:
    """Return the engine that ``--parallel`` names; what it needs is imported now."""
    if name == "fsdp":
        from minillm.distributed.fsdp import FSDP

        return FSDP
    if name == "deepspeed":
        from minillm.distributed.zero import ZeRO

        return ZeRO
    return Engine
