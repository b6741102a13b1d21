"""A calculator that is safe with any text: it walks the syntax tree and computes only what it knows; never ``eval``.

A short text can ask for a number that no computer can hold (``9**9**9``). So the text, the exponents and every
number on the way have limits.
"""

import ast
import operator

MAX_LEN = 200  # characters of an expression
MAX_EXPONENT = 100
MAX_NUMBER = 10**30

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-", "（": "(", "）": ")", "^": "**"})


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression, such as 2*(3+4)/7 or 1.5**2.

    Args:
        expression: numbers with + - * / // % ** and parentheses.
    """
    if len(expression) > MAX_LEN:
        raise ValueError(f"the expression has {len(expression)} characters; at most {MAX_LEN} are allowed")
    try:
        tree = ast.parse(expression.translate(SPELLINGS).strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"not an arithmetic expression: {expression}") from None
    value = _value(tree.body)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.12g}"
    return str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _limited(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > MAX_EXPONENT:
            raise ValueError(f"the exponent {right} is too large; at most {MAX_EXPONENT} is allowed")
        try:
            return _limited(OPERATORS[type(node.op)](left, right))
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
        except OverflowError:
            raise ValueError(f"a number is too large; at most {MAX_NUMBER:.0e} is allowed") from None
    raise ValueError(f"only numbers with + - * / // % ** and parentheses are allowed, not {ast.unparse(node)}")


def _limited(number: int | float | complex) -> int | float:
    if isinstance(number, complex):
        raise ValueError("a root of a negative number has no real value")
    if not abs(number) <= MAX_NUMBER:
        raise ValueError(f"a number is too large; at most {MAX_NUMBER:.0e} is allowed")
    return number
