"""The server on each backend: what it answers is what `generate` makes, with adapters and without."""

import numpy as np
import openai
import pytest
from exported import small_lm
from http_server import PATIENCE, running

PROMPTS = ["The state of our union is", "Call me"]
NEW = 12


@pytest.fixture(scope="module")
def lm():
    lm = small_lm(num_layers=2, max_sequence_length=128)
    draw = np.random.default_rng(1)
    lm.enable_lora(rank=4, targets=["query", "down"], name="tuned")
    for variable in lm.trainable_variables:
        variable.assign(draw.normal(0, 0.5, variable.shape))
    return lm


def test_streams_of_adapters(lm):
    with running(lm, length=128, adapters=("tuned",)) as ((host, port), _):
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        assert [model.id for model in client.models.list()] == ["mini", "tuned"]
        texts = {}
        for model in ("mini", "tuned"):
            with lm.backbone.adapter_set.only(None if model == "mini" else model):
                expected = lm.generate(PROMPTS, max_new_tokens=NEW, sampler="greedy", strip_prompt=True)
            found = client.completions.create(model=model, prompt=PROMPTS, max_tokens=NEW, temperature=0)
            texts[model] = [choice.text for choice in found.choices]
            assert texts[model] == expected
            stream = client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=NEW, temperature=0, stream=True)
            assert "".join(event.choices[0].text for event in stream) == expected[0]
        assert texts["mini"] != texts["tuned"]
        with pytest.raises(openai.NotFoundError, match="There are: mini, tuned"):
            client.completions.create(model="other", prompt="x")
