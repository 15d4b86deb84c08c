"""Hugging Face's Reformer with its reversible container replaced: the same weights, the same outputs.

    pip install -e '.[hf]' && python examples/huggingface_reformer.py --steps 60

Their container hashes once and keeps the buckets, since recovered activations that are off by a rounding would hash
differently. In exact arithmetic they are not off, and nothing needs to be kept.
"""

import copy
from pydoc_data.topics import topics

import torch
from comparison import Training, arguments, compare
from torch import Tensor, nn
from transformers import ReformerConfig, ReformerModelWithLMHead
from transformers.models.reformer.modeling_reformer import ReformerEncoderOutput

from revgrad import AdditiveCoupling, ReversibleSequential

LENGTH, BATCH = 128, 4
CONFIG = ReformerConfig(
    vocab_size=128, hidden_size=64, num_attention_heads=2, attention_head_size=32, feed_forward_size=128,
    attn_layers=["local", "lsh"] * 3, num_hidden_layers=6, num_buckets=8, num_hashes=2, hash_seed=0,
    local_attn_chunk_length=16, lsh_attn_chunk_length=16, max_position_embeddings=LENGTH, axial_pos_shape=(8, 16),
    axial_pos_embds_dim=(16, 48), is_decoder=True, use_cache=False,
    hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
)  # fmt: skip


class Attention(nn.Module):
    """Their attention without what it returns besides."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.attention(x, attention_mask=attention_mask).hidden_states


class ReversibleEncoder(nn.Module):
    """Stands in for their encoder, on the same parameters."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.layer_norm, self.dropout = encoder.layer_norm, nn.Dropout(encoder.dropout)
        couplings = []
        for layer in encoder.layers:
            couplings.append(AdditiveCoupling(Attention(layer.attention), source=1, target=0))
            couplings.append(AdditiveCoupling(layer.feed_forward, source=0, target=1))
        self.chain = ReversibleSequential(*couplings, arithmetic="exact")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: object) -> object:
        asked = [name for name in ("past_buckets_states", "output_hidden_states", "output_attentions") if options[name]]
        if asked:
            raise ValueError(f"a reversible encoder keeps nothing, and so cannot give {', '.join(asked)}")
        streams = self.chain(hidden_states, hidden_states, attention_mask=attention_mask)
        out = self.dropout(self.layer_norm(torch.cat(streams, dim=-1)))
        return ReformerEncoderOutput(out, all_hidden_states=[], all_attentions=[], past_buckets_states=None)


def main(argv: list[str] | None = None) -> dict[str, Training]:
    """Compare with the original, then train stored and reversible."""
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = torch.tensor([min(ord(character), 127) for character in text[:100_000]])

    def loss(model: nn.Module, step: int) -> Tensor:
        windows = tokens[torch.randint(len(tokens) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH)]
        return model(windows, labels=windows).loss

    def replaced() -> nn.Module:
        model = ReformerModelWithLMHead(CONFIG).train()
        model.reformer.encoder = ReversibleEncoder(model.reformer.encoder)
        return model

    torch.manual_seed(0)
    original = ReformerModelWithLMHead(CONFIG).train()
    ours = copy.deepcopy(original)
    ours.reformer.encoder = ReversibleEncoder(ours.reformer.encoder)
    windows = tokens[:LENGTH][None]
    logits = [model(windows).logits for model in (original, ours)]
    for y in logits:
        y.sin().sum().backward()
    grads = [
        torch.cat([p.grad.flatten() for p in model.reformer.embeddings.parameters()]) for model in (original, ours)
    ]
    for name, (a, b) in {"logits": logits, "gradients": grads}.items():
        error = ((a - b).abs().max() / a.abs().max()).item()
        print(f"{name} of Hugging Face's container and of this one differ by {error:.1e} of their size")
        assert error < 1e-3
    return compare(replaced, loss, arguments(argv, steps=60).steps)


if __name__ == "__main__":
    main()
