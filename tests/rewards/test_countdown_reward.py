import json
import pickle
import runpy
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_verl.errors import DataError
from hpo_verl.rewards.countdown import compute_score
from hpo_verl.rewards.expression import read_expression

ORACLES = runpy.run_path(str(Path(__file__).parents[1] / "fuzz" / "oracles.py"))
oracle = ORACLES["countdown_oracle"]
FORMS = "".join(ORACLES["UNICODE_FORMS"].values())


def score(response, target=20, numbers=(3, 7, 2)):
    return compute_score("countdown", response, {"target": target, "numbers": list(numbers)})


def answer(text, target=20, numbers=(3, 7, 2)):
    return score(f"<answer>{text}</answer>", target, numbers)


RIGHT = [
    "(3+7)*2",
    " ( 3 + 7 ) * 2 ",
    "\n(3 + 7)\n* 2\n",
    "((((3+7))))*(2)",
    "2*(7+3)",
    "-(3+7)*(-2)",
    "-2*(-3-7)",
    "(3+7)*2=20",
    "(3 + 7) * 2 = 20 ",
    "(3 + 7) × 2",
    "（3 ＋ 7）＊ 2 ＝ 20",
    "(3 + 7) ⋅ 2",
]


@pytest.mark.parametrize("text", RIGHT)
def test_right_answers(text):
    right = {"score": 1.0, "acc": 1.0, "format": 1.0, "reason": "correct"}
    assert answer(text) == right | {"brevity": 1 - (len(text) + 17) / 4000}


@pytest.mark.parametrize(
    ("text", "target", "numbers"),
    [
        ("8 / (3 - 8 / 3)", 24, (8, 3, 8, 3)),  # needs fractions on the way
        ("7 − 3 − 2", 2, (3, 7, 2)),
        ("(7 － 3) ÷ 2", 2, (3, 7, 2)),
        ("(7 - 3) ∕ 2", 2, (3, 7, 2)),
        ("(7 - 3) ⁄ 2 ", 2, (3, 7, 2)),
        ("2 - 7 - 3 = -8", -8, (3, 7, 2)),
        ("5*0+1", 1, (0, 1, 5)),
        ("1/3*3", 1, (1, 3, 3)),  # 0.333... in floating point arithmetic
        ("999999999 - 999999998", 1, (999999999, 999999998)),
    ],
)
def test_right_answers_to_other_puzzles(text, target, numbers):
    assert answer(text, target, numbers)["reason"] == "correct"


@pytest.mark.parametrize(
    ("text", "reason", "well_formed"),
    [
        ("", "not_an_expression", 0),
        ("   \n", "not_an_expression", 0),
        ("expression", "not_an_expression", 0),  # what the prompt itself shows
        ("20", "wrong_numbers", 1),
        ("(3+7)*2*1", "wrong_numbers", 1),
        ("(3+7)*2+3-3", "wrong_numbers", 1),
        ("3+7", "wrong_numbers", 1),
        ("37-2", "wrong_numbers", 1),
        ("3+7+2", "wrong_value", 1),
        ("7/(3-2)", "wrong_value", 1),
        ("2/(7-3) * 40", "wrong_numbers", 1),
        ("7+3/(2-2)", "wrong_numbers", 1),
        ("(3+7)*2 = 21", "wrong_equation", 1),
        ("3+7+2 = 20", "wrong_value", 1),
        ("(3+7)*2 =", "not_an_expression", 0),
        ("(3+7)*2 = 20 = 20", "not_an_expression", 0),
        ("(3+7)*2 = 2*10", "not_an_expression", 0),
        ("(3+7)*2 == 20", "not_an_expression", 0),
        ("20 = (3+7)*2", "not_an_expression", 0),
        ("(3+7)*2.0", "not_an_expression", 0),
        ("(3+7)*+2", "not_an_expression", 0),
        ("(3+7)*-2", "not_an_expression", 0),
        ("--(3+7)*2", "not_an_expression", 0),
        ("(3+7)2", "not_an_expression", 0),
        ("(3+7)(2)", "not_an_expression", 0),
        ("3 7 2", "not_an_expression", 0),
        ("(3+7*2", "not_an_expression", 0),
        ("3+7)*2", "not_an_expression", 0),
        (")3+7(*2", "not_an_expression", 0),
        ("()", "not_an_expression", 0),
        ("(3+7)*02", "not_an_expression", 0),
        ("(3+7)*2 # right", "not_an_expression", 0),
        ("(3+7)*2; 1", "not_an_expression", 0),
        ("(３+７)*２", "not_an_expression", 0),  # full-width digits
        ("(3+7)*²", "not_an_expression", 0),
        ("(3+7)*٢", "not_an_expression", 0),  # Arabic-Indic digit two
        ("(3+7)*0x2", "not_an_expression", 0),
        ("(3+7)*2_0", "not_an_expression", 0),
        ("(3+7)*2e0", "not_an_expression", 0),
        ("(3+7)*True", "not_an_expression", 0),
        ("__import__('os').system('false')", "not_an_expression", 0),
        ("(lambda: 20)()", "not_an_expression", 0),
        ("(x:=20)", "not_an_expression", 0),
        ("f'{20}'", "not_an_expression", 0),
        ("nan", "not_an_expression", 0),
        ("1e309", "not_an_expression", 0),
        ("1<<10**9", "not_an_expression", 0),
        ("(3+7)*2\x00", "not_an_expression", 0),
        ("(3+7)*\ud8002", "not_an_expression", 0),
        ("\u202e(3+7)*2", "not_an_expression", 0),
        ("<b>(3+7)*2</b>", "not_an_expression", 0),
        ("\\boxed{(3+7)*2}", "not_an_expression", 0),
        ("(3+7) \\times 2", "not_an_expression", 0),
        ("1" * 10, "not_an_expression", 0),
        ("9" * 5000, "not_an_expression", 0),
        ("(" * 33 + "3+7" + ")" * 33 + "*2", "not_an_expression", 0),
        ("(" * 32 + "3+7" + ")" * 32 + "*2", "correct", 1),
        ("(" * 5000 + "3" + ")" * 5000, "not_an_expression", 0),
        ("-" * 5000 + "3", "not_an_expression", 0),
        ("3" + "+1" * 100_000, "too_long", 0),
        ("3" + "+1" * 127, "wrong_numbers", 1),  # 255 characters
        ("3 " + "+1" * 127, "wrong_numbers", 1),  # 256
        ("3" + "+1" * 128, "not_an_expression", 0),  # 257
    ],
)
def test_bounds_and_wrong_answers(text, reason, well_formed):
    result = answer(text)
    assert (result["reason"], result["format"]) == (reason, well_formed)
    assert result["score"] == result["acc"] == (reason == "correct")


def test_defects_of_the_widely_copied_reward():
    """Each row of the table in research/tasks.md that gives a wrong score elsewhere."""
    # The response alone, without the prompt's "Assistant:".
    assert score("<think>hm</think><answer>(3+7)*2</answer>")["score"] == 1
    # An answer over several lines, not on the last line, before a trailing newline.
    assert score("<answer>\n(3 + 7)\n* 2\n</answer>\nThat is it.\n")["score"] == 1
    # No partial reward for empty or copied answers.
    assert answer("")["score"] == 0
    assert answer("(1 + 2) / 3")["score"] == 0
    # Decimals are not two integers, powers and floor division not in the game.
    assert answer("1.5*2", 3, (1, 5, 2))["score"] == 0
    assert answer("2**5", 32, (2, 5))["score"] == 0
    assert answer("2* *5", 32, (2, 5))["score"] == 0
    assert answer("7//2", 3, (7, 2))["score"] == 0
    assert answer("9**9**9", 1, (9, 9, 9))["score"] == 0
    # A right answer with its value, or with a multiplication sign.
    assert answer("3 + 6 = 9", 9, (3, 6))["score"] == 1
    assert answer("3 × 6", 18, (3, 6))["score"] == 1


def test_division_by_zero_is_wrong_wherever_it_stands():
    for text in ("3/(7-7)", "3*(7/(7-7))", "(7-7)/(7-7)", "7-3/(7-7)-7"):
        numbers = [int(c) for c in text if c.isdigit()]
        for target in (0, 1, 3):
            assert answer(text, target, numbers)["reason"] == "division_by_zero"
    assert not read_expression("1/0").equals(0)
    assert answer("7/(3/(2-2))", 0, (7, 3, 2, 2))["reason"] == "division_by_zero"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no_answer"),
        ("(3+7)*2", "no_answer"),
        ("<answer>(3+7)*2", "no_answer"),
        ("(3+7)*2</answer>", "no_answer"),
        ("</answer>(3+7)*2<answer>", "no_answer"),
        ("<Answer>(3+7)*2</Answer>", "no_answer"),
        ("< answer>(3+7)*2</answer>", "no_answer"),
        ("<answer>1</answer><answer>(3+7)*2</answer>", "correct"),
        ("<answer>(3+7)*2</answer><answer>1</answer>", "wrong_numbers"),
        ("<answer>(3+7)*2</answer> then <answer>1", "correct"),
        ("<answer>(3+7)*2</answer></answer>", "correct"),
        ("<answer><answer>(3+7)*2</answer></answer>", "correct"),
        ("<answer>1 <answer>(3+7)*2</answer>", "correct"),
        ("<answer>(3+7)*2</answer></answer> 1</answer>", "correct"),
        ("<think><answer>(3+7)*2</answer></think>", "correct"),
        ("<answer>" * 6000 + "(3+7)*2</answer>", "correct"),
        ("<answer>" + " " * 900 + "(3+7)*2</answer>", "correct"),
        ("<answer>" + " " * 1100 + "(3+7)*2</answer>", "not_an_expression"),
        ("x" * (100_000 - 24) + "<answer>(3+7)*2</answer>", "correct"),
        ("x" * (100_001 - 24) + "<answer>(3+7)*2</answer>", "too_long"),
    ],
)
def test_which_block_counts(response, reason):
    assert score(response)["reason"] == reason


@pytest.mark.parametrize(
    "ground_truth",
    [
        {"target": 20, "numbers": [3, 7, 2]},
        {"target": 20, "numbers": (3, 7, 2), "more": None},
        {"target": np.int64(20), "numbers": np.array([3, 7, 2])},
        {"target": np.array(20), "numbers": np.array([3, 7, 2], dtype=np.uint8)},
        {"target": np.int32(20), "numbers": [np.int16(3), 7, np.int64(2)]},
        json.dumps({"target": 20, "numbers": [3, 7, 2]}),
        np.str_('{"numbers": [2, 3, 7], "target": 20}'),
    ],
)
def test_forms_of_the_ground_truth(ground_truth):
    before = pickle.dumps(ground_truth)
    assert compute_score("c", "<answer>(3+7)*2</answer>", ground_truth)["score"] == 1
    assert compute_score("c", "<answer>(3+7)*3</answer>", ground_truth)["score"] == 0
    assert pickle.dumps(ground_truth) == before


@pytest.mark.parametrize(
    "ground_truth",
    [
        None,
        20,
        "",
        "20",
        "[" * 200_000,
        '{"target": 20, "numbers": [3, 7, 2], "target": 21}',
        "[20]",
        "{'target': 20}",
        {},
        {"target": 20},
        {"numbers": [3, 7, 2]},
        {"target": None, "numbers": [3, 7, 2]},
        {"target": 20.0, "numbers": [3, 7, 2]},
        {"target": np.float64(20), "numbers": [3, 7, 2]},
        {"target": True, "numbers": [3, 7, 2]},
        {"target": "20", "numbers": [3, 7, 2]},
        {"target": 20, "numbers": []},
        {"target": 20, "numbers": "372"},
        {"target": 20, "numbers": 3},
        {"target": 20, "numbers": [3, 7, None]},
        {"target": 20, "numbers": [3, 7, 2.5]},
        {"target": 20, "numbers": np.array([[3, 7], [2, 2]])},
        # What Python cannot write out.
        {"target": 10**5_000},
        reduce(lambda inner, _: [inner], range(10_000), []),
    ],
    ids=lambda truth: type(truth).__name__,
)
def test_malformed_ground_truth_is_an_error(ground_truth):
    with pytest.raises(DataError, match=r"(?s)^my_data: ground_truth is .*needed: "):
        compute_score("my_data", "<answer>(3+7)*2</answer>", ground_truth)


def test_response_that_is_not_text_is_an_error():
    with pytest.raises(DataError, match="solution_str is NoneType"):
        score(None)


def test_verl_call_with_every_keyword():
    result = compute_score(
        data_source="countdown",
        solution_str="<answer>(3+7)*2</answer>",
        ground_truth={"target": 20, "numbers": [3, 7, 2]},
        extra_info={"index": 0, "num_turns": None},
        reward_router_address=None,
        reward_model_tokenizer=None,
    )
    assert result["score"] == 1
    assert [type(value) for value in result.values()] == [float, float, float, str, float]


@pytest.mark.parametrize(
    ("response", "brevity"),
    [("", 1.0), ("a" * 25, 0.75), ("<answer>(3+7)*2</answer>", 0.76), ("a" * 100, 0.0),
     ("a" * 200_000, 0.0)],
)  # fmt: skip
def test_brevity_falls_with_the_length_right_or_wrong(response, brevity):
    truth = {"target": 20, "numbers": [3, 7, 2]}
    result = compute_score("countdown", response, truth, brevity_characters=100)
    assert result["brevity"] == pytest.approx(brevity)


@pytest.mark.parametrize("characters", [0, -1, 1.5, "100", None])
def test_a_length_that_is_none_is_an_error(characters):
    message = rf"^c: brevity_characters = {characters!r}: must be an integer from 1$"
    with pytest.raises(DataError, match=message):
        compute_score("c", "", {"target": 1, "numbers": [1]}, brevity_characters=characters)


PIECES = st.sampled_from(
    [*"0123456789", *"+-*/()= ", *FORMS, "**", "//", "10", "12", "\n", ".", "e", "_", "٣", "\ud800"]
)
NUMBERS = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@st.composite
def expressions(draw, numbers):
    """A random expression over the numbers, in any of its spellings, perhaps spoilt."""
    parts = [str(number) for number in draw(st.permutations(numbers))]
    while len(parts) > 1:
        left = parts.pop(draw(st.integers(0, len(parts) - 1)))
        right = parts.pop(draw(st.integers(0, len(parts) - 1)))
        joined = left + draw(st.sampled_from("+-*/×÷−")) + right
        parts.append(draw(st.sampled_from(["({})", "{}", "( {} )", "-{}"])).format(joined))
    text = parts[0]
    if draw(st.booleans()):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(PIECES) + text[place:]
    return text


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(data=st.data(), numbers=NUMBERS)
def test_one_if_and_only_if_the_judge_agrees_on_expressions(data, numbers):
    text = data.draw(expressions(numbers))
    # A target that the expression reaches, where it has a whole value.
    target = next(
        (t for t in range(-30, 200) if ORACLES["evaluates_to"](text, t, numbers)),
        data.draw(st.integers(-3, 30)),
    )
    text += data.draw(st.sampled_from(["", f"= {target}", f"={target + 1}", " =", "＝ 7"]))
    response = f"<answer>{text}</answer>"
    result = score(response, target, numbers)
    assert result["score"] == oracle(response, target, numbers)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from(["<answer>", "</answer>", "<answer>", "</answer>", "3-2", "1"]),
            st.text(max_size=4),
            st.lists(PIECES, max_size=6).map("".join),
        ),
        max_size=12,
    )
)
def test_one_if_and_only_if_the_judge_agrees_on_responses(parts):
    response = "".join(parts)
    for target, numbers in ((1, [3, 2]), (1, [1])):
        assert score(response, target, numbers)["score"] == oracle(response, target, numbers)
