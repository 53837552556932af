"""Notations of units of measurement, and conversion between units."""

import re
from functools import cache, lru_cache

import pint


# An explicit list, because pint also reads "a" as years, "bar" as a pressure and "in" as inches
UNIT_SYMBOL = (
    r"(?:[kcmdnμ]?m|[km]?g|m?[Ll]|m?s|k?N|[km]?J|[kM]?W|kWh|[mk]?V|m?A|[kM]?Ω|[kMG]?Hz|k?Pa|k?cal|mol|K|h|ft|yd|mi|lbs?"
    r"|oz|mph|kph|psi|min|hrs?|sec|rad|deg|cc|[kMGT]?B|pct|EUR|USD|GBP|in(?=\s?[,;)'\"]|\.?\s?$|\s(?:tall|long|wide|high|deep)\b))"
)
CURRENCY = r"(?:dollars?|bucks|euros?)"
CURRENCY_PART = r"(?:cents?|pence)"
UNIT_WORD = (
    r"(?i:(?:milli|centi|deci|kilo|nano|micro|mega|giga)?(?:met(?:er|re)|gram|lit(?:er|re)|second|watt|volt|ampere|ohm"
    r"|joule|newton|pascal|mole|hertz)s?|inch(?:es)?|foot|feet|yards?|miles?|pounds?|ounces?|tons?|tonnes?|minutes?"
    r"|hours?|days?|weeks?|months?|years?|decades?|century|centuries|radians?|degrees? (?:celsius|fahrenheit)|degrees?"
    rf"|percent|per cent|calories?|kelvins?|knots?|(?:kilo|mega|giga|tera)?bytes?|{CURRENCY}|{CURRENCY_PART})"
)
SIMPLE_UNIT = rf"(?:{UNIT_WORD}|{UNIT_SYMBOL})(?![a-zA-Z])(?:\^?\{{?[23]\}}?(?!\d)|\s(?:squared|cubed))?"
UNIT = rf"(?:°\s?[CF]\b|[°%€£¢]|(?:(?:square|sq|cubic)\.?\s)?{SIMPLE_UNIT}(?:(?:\s?/\s?|\sper\s){SIMPLE_UNIT})?)"
# "12 cm", "a 12-cm side", "a quarter of an hour", "half a ton" (where half has become digits)
UNIT_AFTER = re.compile(rf"\s{{0,30}}-?(?:of an? |(?<=\x1f )an? )?({UNIT})")

# One unit for all currencies, because question and answer seldom both name the currency
PINT_NAMES = {
    "°": "degree", "deg": "degree", "%": "percent", "per cent": "percent", "pct": "percent", "°c": "degC",
    "°f": "degF", "degree celsius": "degC", "degrees celsius": "degC", "degree fahrenheit": "degF",
    "degrees fahrenheit": "degF", "€": "money", "£": "money", "eur": "money", "usd": "money", "gbp": "money",
    "¢": "money_cent", "ton": "tonne", "tons": "tonne",
}  # fmt: skip


@cache
def unit_registry() -> pint.UnitRegistry:
    registry = pint.UnitRegistry()
    registry.define("money = [money]")
    registry.define("money_cent = 0.01 * money")
    return registry


@lru_cache(maxsize=1000)
def read_unit(text: str) -> str | None:
    """Return a unit in pint's notation, `"centimeter ** 2"` for `"sq cm"`; `None` if pint does not know it."""
    text = re.sub(r"[{}]", "", text).replace("° ", "°")
    if re.fullmatch(rf"{CURRENCY}|({CURRENCY_PART})", text, re.IGNORECASE):
        return "money_cent" if re.fullmatch(CURRENCY_PART, text, re.IGNORECASE) else "money"
    text = re.sub(r"(?<=[a-z])(?=[23](?!\d))", "^", text)
    text = PINT_NAMES.get(text.lower(), text.lower() if len(text) > 5 else text)
    try:
        return str(unit_registry().parse_units(text))
    except (pint.errors.PintError, ValueError):
        return None


@lru_cache(maxsize=10_000)
def convert(value: float, unit: str, other_unit: str) -> float | None:
    """Convert a value to another unit; `None` if the units have different dimensions."""
    if {unit, other_unit} in ({"degree", "degree_Celsius"}, {"degree", "degree_Fahrenheit"}):
        return value  # a bare degree sign may mean a temperature
    if {"percent", "count"} & {unit, other_unit}:  # these have no dimension in pint, like angles
        return None
    try:
        return unit_registry().convert(value, unit, other_unit)
    except pint.errors.PintError:
        return None
