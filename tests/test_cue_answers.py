"""Checking answers: they are found and compared as people would, and nothing that a model writes can hang it."""

import time
from threading import Thread

import pytest

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
    # Mathematics
    ("The answer is 120", "12"),
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
        "\\boxed{\\sum_{n=1}^{100000000} \\frac{1}{n^2}}",
        "\\boxed{" + "(" * 3000 + "}",
        "1" * 20_000,
        "answer " * 3000,
        "$" * 20_000,
        "\\boxed{" * 3000,
    ],
)
def test_nothing_takes_long(completion):
    start = time.perf_counter()
    assert not is_correct(completion, "x + 12")
    assert time.perf_counter() - start < 10


def test_in_another_thread():
    results = []
    thread = Thread(target=lambda: results.append(is_correct("\\boxed{\\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert results == [True]
