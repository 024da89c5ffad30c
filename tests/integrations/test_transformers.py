import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402  # noqa: E402
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    GptOssConfig,
    GptOssModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    T5Config,
    T5EncoderModel,
)

import attncc as ac  # noqa: E402
from attncc.integrations.transformers import attention_forward, register  # noqa: E402
from attncc.integrations.transformers_masks import AttentionMask, Pattern, from_tensor  # noqa: E402

register()

DECODER = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}


def tokens(batch=2, length=20):
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(0))


def padding(*lengths, length=20, left=False):
    rows = [[1] * n + [0] * (length - n) for n in lengths]
    return torch.tensor([row[::-1] if left else row for row in rows])


def pair(model_class, config):
    """The same random weights under eager attention and under attncc."""
    torch.manual_seed(0)
    stock = model_class._from_config(config, attn_implementation="eager").eval()
    ours = model_class._from_config(config, attn_implementation="attncc").eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def bert(**kwargs):
    return BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        **kwargs,
    )


def assert_same(stock, ours, ids, mask=None, **kwargs):
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=mask, **kwargs).last_hidden_state
        actual = ours(input_ids=ids, attention_mask=mask, **kwargs).last_hidden_state
    rows = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(actual[rows], expected[rows], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [None, padding(20, 20), padding(20, 7), padding(3, 12, left=True)])
def test_bert_equals_eager_on_every_token(mask):
    assert_same(*pair(BertModel, bert()), tokens(), mask)


def test_bert_takes_a_padding_mask_of_four_dimensions():
    mask = padding(20, 7)
    additive = torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None, :].expand(-1, 1, 20, -1)
    stock, ours = pair(BertModel, bert())
    with torch.no_grad():
        expected = stock(input_ids=tokens(), attention_mask=mask).last_hidden_state
        actual = ours(input_ids=tokens(), attention_mask=additive).last_hidden_state
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-4)


def test_bert_gradients_equal_eager():
    mask = padding(20, 7)
    stock, ours = pair(BertModel, bert())
    for model in (stock, ours):
        hidden = model(input_ids=tokens(), attention_mask=mask).last_hidden_state
        (hidden * mask[:, :, None]).square().sum().backward()
    for (name, a), b in zip(stock.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, atol=1e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mask", [None, padding(20, 9), padding(20, 9, left=True)])
def test_mistral_window_and_grouped_heads(mask):
    assert_same(*pair(MistralModel, MistralConfig(**DECODER, sliding_window=6)), tokens(), mask)


def test_gemma2_softcap_scale_and_alternating_windows():
    config = Gemma2Config(
        **DECODER, sliding_window=6, query_pre_attn_scalar=40, attn_logit_softcapping=2.0, use_cache=False
    )
    assert_same(*pair(Gemma2Model, config), tokens(), padding(20, 9, left=True))


def test_packed_sequences_by_position_ids():
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    stock, ours = pair(MistralModel, MistralConfig(**DECODER, sliding_window=6, use_cache=False))
    assert_same(stock, ours, tokens(batch=1), position_ids=positions)
    with torch.no_grad():  # the second sequence does not see the first
        ids = tokens(batch=1)
        first = ours(input_ids=ids, position_ids=positions).last_hidden_state[:, 8:]
        ids[:, :8] = 1
        second = ours(input_ids=ids, position_ids=positions).last_hidden_state[:, 8:]
    torch.testing.assert_close(first, second)


def test_generation_with_a_growing_cache():
    stock, ours = pair(MistralForCausalLM, MistralConfig(**DECODER, sliding_window=6))
    ids, mask = tokens(length=10), padding(10, 4, length=10, left=True)
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = stock.generate(**arguments, output_logits=True, return_dict_in_generate=True)
    actual = ours.generate(**arguments, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-4)


def test_t5_position_bias_and_its_gradient():
    config = T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    stock, ours = pair(T5EncoderModel, config)
    mask = padding(20, 7)
    assert_same(stock, ours, tokens(), mask)
    for model in (stock, ours):
        hidden = model(input_ids=tokens(), attention_mask=mask).last_hidden_state
        (hidden * mask[:, :, None]).square().sum().backward()
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    torch.testing.assert_close(ours.get_parameter(table).grad, stock.get_parameter(table).grad, atol=1e-3, rtol=1e-3)


def test_gpt_oss_sinks():
    config = GptOssConfig(
        **{k: v for k, v in DECODER.items() if k != "attention_dropout"},
        sliding_window=6,
        num_local_experts=2,
        num_experts_per_tok=1,
        use_cache=False,
    )
    stock, ours = pair(GptOssModel, config)
    for layer in range(2):
        sinks = torch.randn(4, generator=torch.Generator().manual_seed(layer))
        for model in (stock, ours):
            model.layers[layer].self_attn.sinks.data.copy_(sinks)
    assert_same(stock, ours, tokens())


def test_equal_patterns_share_one_op():
    from attncc.integrations.transformers import _op

    assert _op(Pattern(causal=True, window=6)) is _op(Pattern(causal=True, window=6))


# What cannot be honoured is refused by name.


def test_dropout_in_training_is_refused():
    _, ours = pair(BertModel, bert())
    ours.train()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    with pytest.raises(ac.UnsupportedError, match=r"dropout of 0\.1"):
        ours(input_ids=tokens())


def test_attention_weights_are_refused():
    _, ours = pair(BertModel, bert())
    with pytest.raises(ac.UnsupportedError, match="output_attentions"):
        ours(input_ids=tokens(), output_attentions=True)


def test_a_padding_mask_with_a_hole_is_refused():
    _, ours = pair(BertModel, bert())
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 5] = 0
    with pytest.raises(ac.UnsupportedError, match="between visible ones"):
        ours(input_ids=tokens(), attention_mask=mask)


def test_a_general_mask_of_four_dimensions_is_refused():
    _, ours = pair(BertModel, bert())
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()  # BERT's encoder is not causal
    with pytest.raises(ac.UnsupportedError, match="not padding"):
        ours(input_ids=tokens(), attention_mask=mask)


def test_an_additive_mask_with_finite_values_is_refused():
    bias = torch.full((2, 1, 20, 20), -3.0)
    with pytest.raises(ac.UnsupportedError, match="other than 0 and minus infinity"):
        from_tensor(bias, 20, 20, False, None)


@pytest.mark.parametrize("window", [None, 3])
def test_a_static_cache_is_refused(window):
    _, ours = pair(MistralForCausalLM, MistralConfig(**DECODER, sliding_window=window))
    with pytest.raises(ac.UnsupportedError, match="cache(.|\n)*cache_implementation='dynamic'"):
        ours.generate(input_ids=tokens(length=5), max_new_tokens=2, cache_implementation="static", disable_compile=True)


def test_an_unknown_part_of_a_mask_is_refused():
    from transformers.masking_utils import create_causal_mask

    config = MistralConfig(**DECODER)
    config._attn_implementation = "attncc"
    with pytest.raises(ac.UnsupportedError, match="part that is not known"):
        create_causal_mask(
            config=config,
            inputs_embeds=torch.zeros(2, 20, 64),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=lambda b, h, q_idx, kv_idx: kv_idx < 3,
        )


@pytest.mark.parametrize(
    ("argument", "value"),
    [("head_mask", torch.ones(2)), ("cu_seq_lens_q", torch.tensor([0, 4])), ("brand_new_option", 3)],
)
def test_arguments_that_could_change_the_result_are_refused(argument, value):
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ac.UnsupportedError, match=argument):
        attention_forward(torch.nn.Module(), q, q, q, None, is_causal=True, **{argument: value})


def test_causal_lengths_that_differ_without_a_mask_are_refused():
    q, k = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 6, 16)
    with pytest.raises(ac.UnsupportedError, match="4 queries to 6 keys"):
        attention_forward(torch.nn.Module(), q, k, k, None, is_causal=True)


# Reading masks, apart from running them.


def test_a_causal_tensor_with_padding_is_read_back():
    keep = padding(20, 9, left=True).bool()
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    mask = from_tensor(keep[:, None, None, :] & causal, 20, 20, True, None)
    assert mask.pattern == Pattern(causal=True, left_padding=True)
    assert mask.starts.tolist() == [0, 11]


def test_a_windowed_tensor_is_read_back():
    behind = torch.arange(20)[:, None] - torch.arange(20)
    tensor = ((behind >= 0) & (behind < 6)).expand(1, 1, 20, 20)
    assert from_tensor(tensor, 20, 20, True, 6) == AttentionMask(Pattern(causal=True, window=6))
