"""Conversion between units of one kind."""

# Kind: unit to its size in the first unit of the kind.
FACTORS = {
    "length": {"m": 1, "km": 1000, "cm": 0.01, "mm": 0.001, "mile": 1609.344, "yard": 0.9144, "ft": 0.3048,
               "inch": 0.0254},
    "mass": {"g": 1, "kg": 1000, "mg": 0.001, "t": 1e6, "lb": 453.59237, "oz": 28.349523125, "jin": 500},
    "time": {"s": 1, "ms": 0.001, "min": 60, "h": 3600, "day": 86400, "week": 604800},
    "volume": {"l": 1, "ml": 0.001, "m3": 1000, "gallon": 3.785411784, "pint": 0.473176473},
    "area": {"m2": 1, "km2": 1e6, "ha": 1e4, "mu": 2000 / 3, "acre": 4046.8564224},
    "speed": {"m/s": 1, "km/h": 1 / 3.6, "mph": 0.44704},
}  # fmt: skip
# Temperatures: degrees at 0 K, and degrees per kelvin.
SCALES = {"C": (-273.15, 1.0), "F": (-459.67, 1.8), "K": (0.0, 1.0)}


def convert_units(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a value from one unit into another one of the same kind.

    Args:
        value: the number to convert.
        from_unit: its unit, such as km, kg, h, l, m2, km/h or C.
        to_unit: the wanted unit, such as mile, lb, min, gallon, acre, mph or F.
    """
    if from_unit in SCALES and to_unit in SCALES:
        (zero, per_kelvin), (other_zero, other_per_kelvin) = SCALES[from_unit], SCALES[to_unit]
        kelvin = (value - zero) / per_kelvin
        return _with_unit(kelvin * other_per_kelvin + other_zero, to_unit)
    for factors in FACTORS.values():
        if from_unit in factors and to_unit in factors:
            return _with_unit(value * factors[from_unit] / factors[to_unit], to_unit)
    kinds = "; ".join(", ".join(units) for units in [*FACTORS.values(), SCALES])
    raise ValueError(f"cannot convert {from_unit} into {to_unit}; units of one kind are {kinds}")


def _with_unit(value: float, unit: str) -> str:
    return f"{value:.10g} {unit}"
