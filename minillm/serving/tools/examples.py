"""Example tools (``--tools minillm/serving/tools/examples.py``), each safe with any arguments that a model writes."""

from datetime import datetime
from zoneinfo import ZoneInfo

from minillm.serving.tools.calculator import calculate
from minillm.serving.tools.units import convert_units


def current_time(timezone: str = "UTC") -> str:
    """Return date, weekday and time of day.

    Args:
        timezone: a name of the IANA database, such as Asia/Shanghai, Europe/Paris or UTC.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ValueError, LookupError, OSError):
        raise ValueError(f"there is no time zone {timezone}; give a name such as Asia/Shanghai, or UTC") from None
    return datetime.now(zone).strftime("%Y-%m-%d, %A, %H:%M:%S")


TOOLS = [calculate, current_time, convert_units]
