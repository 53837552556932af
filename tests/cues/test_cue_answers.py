"""Answers are found and compared as a person would, and no completion can hang the check."""

import time
from decimal import Decimal
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_vicur.cues.answers import is_correct


CORRECT = [
    # Options
    ("The answer is B.", "B"),
    ("B", "B"),
    ("b", "(B)"),
    ("(b)", "B"),
    ("B. 12 cm", "B"),
    ("B. Because the chord is the longest one.", "B"),
    ("So the correct option is B", "B"),
    ("Option B is right, since AB is 5.", "B"),
    ("The answer is: $\\text{B}$", "B"),
    ("<think>A? No, C.</think>The answer is B", "B"),
    ("The triangle is right. <answer>B</answer>", "B"),
    ("**Answer:** (B)", "B"),
    ("Answer: \\boxed{\\textbf{(B)}}", "B"),
    ("The answer is B. 12 cm", "B. 12 cm"),
    ("The answer is 12 cm.", "B. 12 cm"),
    ("The answer is (B) 12 cm", "12 cm"),
    ("Therefore, option (d) is correct.", "D"),
    ("So I would choose option b.", "B"),
    ("I would go with option a.", "A"),
    ("The only option a student has is B", "B"),
    ("The result of f(x) points to (c)", "C"),
    ("D", "(d)"),
    ("The answer is (d) 5 cm", "d)"),
    # Mathematics
    ("The length is 12 cm.", "12"),
    ("Thus x = 12.", "12"),
    ("First \\boxed{11}, no: \\boxed{12.0}", "12"),
    ("The answer is twelve.", "12"),
    ("There are three circles.", "3"),
    ("10 · 100\n#### 1,000", "1000"),
    ("The answer is \\(\\frac{1}{2}\\).", "0.5"),
    ("\\[\\boxed{\\dfrac{1}{2}}\\]", "1/2"),
    ("The answer is 2√3 cm", "2\\sqrt{3}"),
    ("The angle comes to 30°.", "30"),
    ("We get $x = \\frac{1}{2}$ as the ratio.", "1/2"),
    ("Final answer:\n\n12", "12"),
    ("\\boxed{50\\%}", "50%"),
    ("The answer is 1 1/2", "1.5"),
    ("The answer is 1.2e1", "12"),
    ("\\boxed{(3, 4)}", "(3,4)"),
    ("\\boxed{2x+1}", "1 + 2x"),
    ("x = 3", "x=3"),
    ("The answer is $5.00", "5"),
    ("The answer is approximately 12.5 m", "12.5"),
    ("\\boxed{x^2+1}", "x²+1"),
    ("The answer is −3.", "-3"),
    ("It is 3:20.", "3:20"),
    ("The answer is 10-20.", "10-20"),
    ("\\boxed{16e-20}", "1.6\\times 10^{-19}"),
    ("\\boxed{9.1\\times 10^{-31}\\text{ kg}}", "9.10 \\cdot 10^{-31}"),
    ("\\boxed{0.0000001}", "1.0\\times10^{-7}"),
    # A decimal of six digits may be rounded, alone and within a tuple, an interval or an equation
    ("\\boxed{0.333333}", "1/3"),
    ("\\boxed{3.14159}", "\\pi"),
    ("\\boxed{2.44949}", "2.4494897"),
    ("\\boxed{6.02214\\times 10^{23}}", "6.022141\\times 10^{23}"),
    ("\\boxed{(0.333333, 2)}", "(1/3, 2)"),
    ("\\boxed{x = 0.333333}", "x=1/3"),
    # A percentage is a share, or a number of percent
    ("\\boxed{0.5}", "50\\%"),
    ("\\boxed{50\\%}", "50"),
    ("50 percent", "50%"),
    ("\\boxed{0.005}", "0.5%"),
    # Sets
    ("\\boxed{x\\in[0,1]}", "[0,1]"),
    ("The answer is x ∈ (2, ∞)", "(2,\\infty)"),
    ("\\boxed{x\\in(0,1)}", "0<x<1"),
    ("\\boxed{0\\le x\\le 1}", "[0,1]"),
    ("\\boxed{0.5<x<1}", "0.5<x<1.0"),
    ("\\boxed{[0,1)∪(2,3]}", "[0,1)\\cup(2,3]"),
    ("\\boxed{±2}", "\\pm 2"),
    # Words
    ("Yes, the circle is blue.", "yes"),
    ("No. The circle is red.", "No"),
    ("The answer is no, because it is red.", "no"),
    ("The shape is a red circle.", "red circle"),
    ("The circle is red because it looks so.", "Red"),
    ("**Red**", "red"),
    ("It's on the left.", "left"),
    ('The answer is "increasing".', "increasing"),
    ("The sign says: Stop!", "stop"),
]
WRONG = [
    # Options
    ("The answer is C.", "B"),
    ("The answer is not B but C.", "B"),
    ("Point B is next to line C.", "B"),
    ("A triangle", "A"),
    ("The answer choices are: A, B", "B"),
    ("So, options (a) and (b)", "A"),
    ("It is (c), not (d).", "C"),
    # Mathematics
    ("The answer is 120", "12"),
    # At any scale
    ("\\boxed{3.2\\times 10^{-19}}", "1.6\\times 10^{-19}"),
    ("\\boxed{-1.6\\times 10^{-19}}", "1.6\\times 10^{-19}"),
    ("\\boxed{0}", "1.6\\times 10^{-19}"),
    ("\\boxed{9.1\\times 10^{-31}\\text{ kg}}", "1.67\\times 10^{-27}"),
    ("\\boxed{0.0000002}", "0.0000001"),
    ("\\boxed{\\sqrt{2}\\cdot 10^{-19}}", "-\\sqrt{2}\\cdot 10^{-19}"),
    ("\\boxed{10^{-9}x}", "2\\cdot 10^{-9}x"),
    ("\\boxed{x=10^{-9}}", "x=2\\cdot 10^{-9}"),
    ("\\boxed{(1\\times 10^{-19}, 2)}", "(2\\times 10^{-19}, 2)"),
    ("\\boxed{[10^{-9}, 2]}", "[2\\cdot 10^{-9}, 2]"),
    ("\\boxed{9^{99}}", "9^{99}+1"),
    ("\\boxed{1000001}", "1000002"),
    ("\\boxed{1000001.5}", "1000002.5"),
    ("\\boxed{1234560}", "1234561.5"),
    # Too few digits to be a rounded value
    ("\\boxed{0.3333}", "1/3"),
    ("\\boxed{12.0}", "12.00004"),
    ("\\boxed{5%}", "50%"),
    ("\\boxed{0.5%}", "50%"),
    ("\\boxed{-50%}", "50%"),
    ("\\boxed{x\\in[0,2]}", "[0,1]"),
    ("\\boxed{x\\in[0,1)}", "[0,1]"),
    ("\\boxed{x>2}", "[2,\\infty)"),
    ("\\boxed{2}", "\\pm 2"),
    ("\\boxed{1/0}", "5"),
    ("\\boxed{-\\infty}", "\\infty"),
    ("The answer is 1.12", "12"),
    ("The answer is -5", "5"),
    ("The answer is x - 1", "x + 1"),
    ("The answer is 3:20", "4:20"),
    ("20-30", "10-20"),
    ("2019-05-04", "2018-05-03"),
    ("The answer is (5, 3)", "(3, 5)"),
    ("It is 12 or 13.", "13"),
    ("The answer is 12. Or is it 13?", "13"),
    # Words
    ("No, it isn't.", "yes"),
    ("It is not red.", "red"),
    ("There is no circle.", "circle"),
    ("It is a circle or a triangle.", "circle"),
    ("top left", "left"),
    ("\\boxed{2 blue circles}", "2 red circles"),
    # No answer
    ("", "B"),
    ("I cannot answer that.", "12"),
    ("<think>The answer is B", "B"),
    ("The answer is \\boxed{1", "12"),
]


@pytest.mark.parametrize(("completion", "answer"), CORRECT)
def test_correct_answers(completion, answer):
    assert is_correct(completion, answer)


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_wrong_answers(completion, answer):
    assert not is_correct(completion, answer)


MANTISSAS = st.integers(-99_999, 99_999).map(lambda number: number / 10_000)
EXPONENTS = st.integers(-90, 90)


@settings(deadline=None, max_examples=100)
@given(one=MANTISSAS, other=MANTISSAS, exponent=EXPONENTS)
def test_scale_and_sign_do_not_change_the_verdict(one, other, exponent):
    scale = rf"\times 10^{{{exponent}}}"
    assert is_correct(rf"\boxed{{{one}{scale}}}", f"{other}{scale}") == (one == other)
    assert is_correct(rf"\boxed{{{-one}{scale}}}", f"{-other}{scale}") == (one == other)
    assert is_correct(rf"\boxed{{{-one}{scale}}}", f"{one}{scale}") == (one == 0)


@settings(deadline=None, max_examples=60)
@given(one=MANTISSAS.filter(bool), exponent=st.integers(-12, 12), shift=st.integers(-12, 12))
def test_all_notations_of_a_number_are_equal(one, exponent, shift):
    plain = f"{Decimal(str(one)).scaleb(exponent):f}"
    shifted = f"{Decimal(str(one)).scaleb(exponent - shift):f}" + rf"\times 10^{{{shift}}}"
    assert is_correct(rf"\boxed{{{shifted}}}", plain) and is_correct(rf"\boxed{{{plain}}}", shifted)


@settings(deadline=None, max_examples=60)
@given(numerator=st.integers(1, 999), exponent=st.integers(-30, 30), digits=st.integers(2, 12))
def test_value_rounded_to_six_digits_counts_at_any_scale(numerator, exponent, digits):
    """For fractions without a finite decimal notation."""
    numerator = numerator * 7 + 1
    rounded = f"{numerator / 7:.{digits - 1}e}".partition("e")
    text = rf"{rounded[0]}\times 10^{{{int(rounded[2]) + exponent}}}"
    has_digits = len(rounded[0].replace(".", "").rstrip("0")) >= 6
    assert is_correct(rf"\boxed{{{text}}}", rf"\frac{{{numerator}}}{{7}}\times 10^{{{exponent}}}") == has_digits


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{2^{1000000000}}",
        "\\boxed{100000000!}",
        "\\boxed{\\binom{1000000000}{500000000}}",
        "\\boxed{\\gamma 9999999}",
        "\\boxed{(x+y+z)^{500}}",
        "\\boxed{\\sin(\\sin(\\sin(\\sin(\\sin(x)))))}",
        "\\boxed{\\int_0^1 \\sin(x^{x^x}) e^{\\cos x} dx}",
        "\\boxed{x^9+3x^7-2x^5+x<1}",
        "\\boxed{\\sum_{n=1}^{100000000} \\frac{1}{n^2}}",
        "\\boxed{" + "(" * 3000 + "}",
        "1" * 20_000,
        "answer " * 3000,
        "$" * 20_000,
        "\\boxed{" * 3000,
    ],
)
def test_hostile_completions_are_judged_quickly(completion):
    start = time.perf_counter()
    assert not is_correct(completion, "x + 12")
    assert time.perf_counter() - start < 10


def test_answers_are_compared_in_another_thread():
    results = []
    thread = Thread(target=lambda: results.append(is_correct("\\boxed{\\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert results == [True]
