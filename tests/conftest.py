import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from promptbook.zoo import IMAGE_MEAN, IMAGE_STD, Backbone, tiny_clip_config, tiny_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def backbone():
    """A CLIP with random weights and other widths than the tiny one."""
    torch.manual_seed(1)
    config = tiny_clip_config()
    config.text_config.update(dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4))
    config.vision_config.update(dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4))
    config.projection_dim = 32
    config.text_config.projection_dim = config.vision_config.projection_dim = 32
    model = CLIPModel._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    with torch.no_grad():                                        # initial weights are tiny; larger ones make differences visible
        for p in model.parameters(): p.copy_(p * 3 if p.ndim > 1 else p)
    return Backbone("random", model, tiny_tokenizer(), tuple(IMAGE_MEAN), tuple(IMAGE_STD))
