"""Two questions that a person can read, and their answers. Knows text and chat templates; knows nothing of engines.

Each is about a page of its own, so a page that is loaded instead of computed changes the answer if a byte of it is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .messages import Answer

QUESTIONS = (
    (
        "The lighthouse of Kern Point stands on a cliff above the northern bay. Fishermen built the first tower of oak "
        "in 1794, and a storm broke it eleven years later. The tower of today was built of grey granite between 1807 "
        "and 1812. It is 41 metres high, and 203 steps lead to its lamp. For a hundred years the lamp burned whale oil "
        "and then paraffin. In 1923 it became electric, and since then ships see it from 24 miles away. Its last "
        "keeper, Ada Marlow, lived in the tower with two cats and a piano until 1986. Now the lamp works by itself, and "
        "in summer visitors may climb the stairs and look at the seals.",
        "How high is the lighthouse?",
    ),
    (
        "Bread from a cold dough needs little work but some patience. Mix 500 grams of flour, 350 grams of water, 10 "
        "grams of salt and only one gram of yeast in the evening. Stir until no dry flour is left, cover the bowl and "
        "put it into the fridge. After twelve hours fold the dough four times, shape it into a ball and let it rest for "
        "two hours in a warm kitchen. Heat the oven with an iron pot in it to 240 degrees. Bake the loaf in the closed "
        "pot for thirty minutes and without the lid for fifteen more. Let it cool on a rack before you cut it, because "
        "the crumb is still wet while it is hot.",
        "How much flour does the dough need?",
    ),
)


def prompts(model: Path) -> dict[str, list[int]]:
    """Return the prompts by id, in the model's own chat template. Empty for a model without one: its replies make no chat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.chat_template:
        return {}
    return {
        _id(index): list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{page}\n\n{question} Answer in one sentence."}],
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
        )
        for index, (page, question) in enumerate(QUESTIONS)
    }


def shown(answers: Sequence[Answer], model: Path) -> Iterator[str]:
    """Yield lines for the terminal: each question, the computed answer, and the answer after kvkern had loaded the page."""
    by_key = {(answer.case, answer.prompt_id): answer for answer in answers}
    for index, (_, question) in enumerate(QUESTIONS):
        computed = by_key.get(("recompute_float32", _id(index)))
        loaded = by_key.get(("kvkern_hit_float32", _id(index)))
        if computed is None or loaded is None:
            continue
        yield f"question: {question}"
        for how, answer in (("computed", computed), (f"{loaded.loaded_tokens} tokens loaded by kvkern", loaded)):
            yield f"  {how}, first token after {answer.ttft_s:.2f} s: {_text(answer, model)}"


def _id(index: int) -> str:
    return f"question-{index}"


def _text(answer: Answer, model: Path) -> str:
    """Return the reply up to its end. Requests ignore the end, so that all replies have the same length."""
    from tokenizers import Tokenizer

    ends = _ends(model)
    tokens = list(answer.tokens)
    end = next((position for position, token in enumerate(tokens) if token in ends), None)
    text: str = Tokenizer.from_file(str(model / "tokenizer.json")).decode(tokens[:end])
    return " ".join(text.split()) + (" ..." if end is None else "")


def _ends(model: Path) -> set[int]:
    ends: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            end = json.loads((model / name).read_text()).get("eos_token_id")
            ends |= set(end) if isinstance(end, list) else {end} - {None}
    return ends
