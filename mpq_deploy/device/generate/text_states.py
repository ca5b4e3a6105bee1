"""What the denoiser is told of prompts: states of tokens, and one vector per text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpq_deploy.device.generate.generation_folder import (
    FLUX,
    POOLED,
    SD,
    SD3,
    SDXL,
    STATES,
    TEXT_OUTPUTS,
    Generation,
)
from mpq_deploy.device.generate.graph_runner import OpenPart, run_in_rows
from mpq_deploy.device.generate.noise_schedule import Array
from mpq_deploy.device.generate.prompt_tokens import token_ids

Texts = dict[str, Array]


def encode_texts(
    generation: Generation,
    texts: list[str],
    opened: Callable[[str], OpenPart],
    freed: Callable[[str], None],
    warn: Callable[[str], None],
) -> Texts:
    """Return the denoiser's text inputs, a row per text; encoders are opened one after the other."""
    outputs: dict[str, dict[str, Array]] = {}
    warned: set[str] = set()
    for name in TEXT_OUTPUTS[generation.kind]:
        if name not in generation.parts:
            continue
        use = generation.tokenizers[name.replace("text_encoder", "tokenizer")]
        ids, cut = token_ids(use, texts, generation.kind != SD3)
        for text in cut:
            if text and text not in warned:
                warn(f"the prompt is cut at {use.length} tokens; left out: {text}")
                warned.add(text)
        part = generation.parts[name]
        feeds = {next(iter(part.inputs)): ids}
        outputs[name] = run_in_rows(part, opened(name), feeds)
        freed(name)
    return _joined(generation, outputs, len(texts))


def _joined(generation: Generation, outputs: dict[str, dict[str, Array]], rows: int) -> Texts:
    first = outputs["text_encoder"]
    if generation.kind == SD:
        return {"encoder_hidden_states": first[STATES]}
    second = outputs["text_encoder_2"]
    if generation.kind == FLUX:
        return {"encoder_hidden_states": second[STATES], "pooled_projections": first[POOLED]}
    states = np.concatenate([first[STATES], second[STATES]], axis=-1)
    if generation.kind == SDXL:
        return {"encoder_hidden_states": states, "text_embeds": second[POOLED]}
    assert generation.kind == SD3
    if "text_encoder_3" in outputs:
        third = outputs["text_encoder_3"][STATES]
    else:
        length, width = (int(generation.settings[key]) for key in ("t5_length", "text_width"))
        third = np.zeros((rows, length, width), np.float32)
    wide = np.pad(states, ((0, 0), (0, 0), (0, third.shape[-1] - states.shape[-1])))
    pooled = np.concatenate([first[POOLED], second[POOLED]], axis=-1)
    return {
        "encoder_hidden_states": np.concatenate([wide, third], axis=1),
        "pooled_projections": pooled,
    }
