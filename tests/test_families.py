"""The converter as a library, on models of other families: real classes with small random weights, and no download.

Each is counted by its own class of norms, which knows nothing of the converter.
"""

import copy
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dytrun
from dytrun import Derf, DynamicTanh, UserError, convert_norms, end_zero_init, llama_rules, scale_embedding
from dytrun.norm import PointWise


def llama(kind: str = "Llama") -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 40, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    tokens = torch.arange(24).view(2, 12) % 40
    return getattr(transformers, f"{kind}ForCausalLM")(config), {"input_ids": tokens, "labels": tokens}


def wav2vec2(is_stable: bool = False, features: str = "group") -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_feat_extract_layers=3,
        conv_dim=[16] * 3, conv_kernel=[5, 3, 3], conv_stride=[3, 2, 2], num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, do_stable_layer_norm=is_stable, feat_extract_norm=features,
        mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config), {"input_values": torch.sin(torch.arange(2 * 600.0)).view(2, 600)}


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10,
        )  # fmt: skip
    images = torch.sin(torch.arange(2 * 4 * 64.0)).view(2, 4, 8, 8)
    return model, {"hidden_states": images, "timestep": torch.tensor([1, 5]), "class_labels": torch.tensor([0, 3])}


class LongConvolution(nn.Module):
    """What mixes tokens in HyenaDNA: projections, a filter as long as the sequence, gates (arXiv 2306.15794)."""

    def __init__(self, width: int, length: int):
        super().__init__()
        self.inner, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.filter = nn.Parameter(torch.randn(width, length) / length)

    def forward(self, x: Tensor) -> Tensor:
        value, first, second = self.inner(x).transpose(1, 2).chunk(3, 1)
        length = x.shape[1]
        spectrum = torch.fft.rfft(value * first, 2 * length) * torch.fft.rfft(self.filter, 2 * length)
        return self.out((torch.fft.irfft(spectrum, 2 * length)[..., :length] * second).transpose(1, 2))


class HyenaBlock(nn.Module):
    def __init__(self, width: int, length: int):
        super().__init__()
        self.mixer, self.norm1 = LongConvolution(width, length), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class RMSNorm(nn.Module):
    """RMSNorm as state space models bring it along: a class of their own, without a bias."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class CaduceusBlock(nn.Module):
    """A gated recurrence over the sequence in both directions, with shared weights (arXiv 2403.03234)."""

    def __init__(self, width: int, _length: int):
        super().__init__()
        self.norm, self.inner, self.out = RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mixed(y) + self.mixed(y.flip(1)).flip(1)

    def mixed(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, -1)
        return self.out(torch.cumsum(value * gate.sigmoid(), 1) / x.shape[1])


class Genome(nn.Module):
    """A stack of residual blocks over four bases, and a last norm."""

    def __init__(self, block: type, norm: type):
        super().__init__()
        self.embedding = nn.Embedding(5, 16)
        self.layers = nn.ModuleList(block(16, 24) for _ in range(3))
        self.norm_f, self.head = norm(16), nn.Linear(16, 5)

    def forward(self, bases: Tensor) -> Tensor:
        x = self.embedding(bases)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm_f(x))


def genome(block: type, norm: type) -> tuple[nn.Module, dict[str, Tensor]]:
    return Genome(block, norm), {"bases": torch.arange(48).view(2, 24) % 5}


def vit(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = timm.create_model(name, depth=2, embed_dim=32, num_heads=4, img_size=28, num_classes=5, patch_size=14)
    return model, {"x": torch.sin(torch.arange(2 * 3 * 28 * 28.0)).view(2, 3, 28, 28)}


def named(*names: str):
    return lambda module: type(module).__name__ in names


# family: (how to build it, which modules are its norms, types, sites, parameters a site more for DyT)
FAMILIES = {
    "llama": (llama, named("LlamaRMSNorm"), ["rmsnorm"], 7, 1),
    "qwen3": (lambda: llama("Qwen3"), named("Qwen3RMSNorm"), ["rmsnorm"], 13, 1),
    "wav2vec2": (wav2vec2, named("LayerNorm"), ["layernorm"], 6, 1),
    "wav2vec2 large": (lambda: wav2vec2(True), named("LayerNorm"), ["layernorm"], 6, 1),
    "wav2vec2 lv60": (lambda: wav2vec2(True, "layer"), named("LayerNorm"), ["layernorm"], 9, 1),
    "dit": (dit, named("LayerNorm"), ["layernorm"], 5, 1),
    "hyena": (lambda: genome(HyenaBlock, nn.LayerNorm), named("LayerNorm"), ["layernorm"], 7, 1),
    "caduceus": (lambda: genome(CaduceusBlock, RMSNorm), named("RMSNorm"), [RMSNorm], 4, 1),
    "mae": (lambda: vit("vit_base_patch16_224.mae"), named("LayerNorm"), ["layernorm"], 5, 1),
    "dino": (lambda: vit("vit_small_patch14_dinov2"), named("LayerNorm"), ["layernorm"], 5, 1),
}


def built(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return FAMILIES[family][0]()


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs)
    for name in ("logits", "last_hidden_state", "sample"):
        found = getattr(found, name, found)
    return found


@pytest.mark.parametrize("norm", ["dyt", "derf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_trains_and_is_read_back(family, norm):
    _, is_norm, types, count, more = FAMILIES[family]
    plain, inputs = built(family)
    model, _ = built(family)
    assert count == sum(map(is_norm, model.modules()))
    sites = convert_norms(model, norm, types=types)
    assert len(sites) == count == sum(isinstance(module, PointWise) for module in model.modules())
    assert not any(map(is_norm, model.modules()))
    before, after = plain.state_dict(), model.state_dict()
    new = {f"{site.name}.alpha" for site in sites} | {f"{site.name}.shift" for site in sites if norm == "derf"}
    assert after.keys() - before.keys() == new
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    num = [sum(p.numel() for p in one.parameters()) for one in (plain, model)]
    assert num[1] - num[0] == count * more * (1 if norm == "dyt" else 2)

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    target = torch.sin(torch.arange(output(model, inputs).numel())).view_as(output(model, inputs))
    losses = []
    for _ in range(4):
        loss = F.mse_loss(output(model, inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]
    assert all(model.get_parameter(f"{site.name}.alpha").grad.abs().item() > 0 for site in sites)

    again, _ = built(family)
    convert_norms(again, norm, types=types)
    assert not again.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(output(again.eval(), inputs), output(model.eval(), inputs))


def test_llamas_alphas_go_by_place_and_width_and_there_is_no_bias():
    model, _ = llama()
    sites = convert_norms(model, "dyt", types=["rmsnorm"], rules=llama_rules(4096))
    roles = {site.name: (site.role, site.alpha_init) for site in sites}
    assert roles["model.layers.0.input_layernorm"] == ("attention", 0.8)
    assert roles["model.layers.2.post_attention_layernorm"] == ("feed_forward", 0.2)
    assert roles["model.norm"] == ("final", 0.2)
    assert all(module.bias is None for module in model.modules() if isinstance(module, PointWise))
    assert model.model.norm.alpha.item() == pytest.approx(0.2)


# class of transformers, its configuration: roles of its norms (a attention, f feed-forward, q qk, o other, F final)
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
DECODER = TINY | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
SEQUENCES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 40,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0}  # fmt: skip
ROLES = {
    "MistralForCausalLM": (DECODER, "afF"),
    "Qwen2ForCausalLM": (DECODER, "afF"),
    "Olmo2ForCausalLM": (DECODER, "qqafF"),  # after attention, and after the feed-forward layer
    "Glm4ForCausalLM": (DECODER, "afafF"),
    "ApertusForCausalLM": (DECODER, "qqafF"),
    "PersimmonForCausalLM": (TINY, "qqafF"),
    "GPT2LMHeadModel": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}, "afF"),
    "OPTModel": ({"hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 24, "num_attention_heads": 2, "vocab_size": 40,
                  "word_embed_proj_dim": 16}, "oaf"),  # the last one is registered first
    "BertModel": (TINY, "oaf"),
    "ViTModel": (TINY, "afF"),
    "T5Model": ({"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}, "afoaafF"),
    "WhisperModel": (SEQUENCES, "afoaafF"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
def test_roles_of_what_hugging_face_has(name):
    transformers = pytest.importorskip("transformers")
    values, roles = ROLES[name]
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**values))
    sites = convert_norms(model, types=["layernorm", "rmsnorm"])
    letter = {"attention": "a", "feed_forward": "f", "qk": "q", "other": "o", "final": "F"}
    assert "".join(letter[site.role] for site in sites) == roles
    assert len({site.block for site in sites} - {None}) == (2 if "aa" in roles else 1), "encoder and decoder, or one"


def test_the_papers_table_of_alphas_is_kept_and_filled_in():
    table = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}
    for width, (attention, other) in table.items():
        assert llama_rules(width) == pytest.approx({"*": other, "attention": attention})
    assert llama_rules(64) == llama_rules(1024)
    assert llama_rules(16384) == pytest.approx(llama_rules(8192))
    between = llama_rules(2896)  # half-way between 2048 and 4096, by their logarithms
    assert between["*"] == pytest.approx((0.5 * 0.2) ** 0.5, rel=1e-3)
    with pytest.raises(UserError, match="0 is no width"):
        llama_rules(0)


def test_an_embedding_is_scaled_by_a_scalar_that_learns_and_ties_stay():
    model, inputs = llama()
    embedding = model.get_input_embeddings()
    model.lm_head.weight = embedding.weight
    plain = embedding(inputs["input_ids"])
    scale = scale_embedding(embedding)
    assert scale.item() == pytest.approx(32**0.5)
    assert torch.allclose(embedding(inputs["input_ids"]), plain * 32**0.5)
    assert model.lm_head.weight is embedding.weight
    assert "model.embed_tokens.scale" in model.state_dict()
    convert_norms(model, "dyt", types=["rmsnorm"], rules=llama_rules(32))
    model(**inputs).loss.backward()
    assert scale.grad.abs().item() > 0
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert twin.get_input_embeddings().scale is not scale
    with pytest.raises(UserError, match="scaled already"):
        scale_embedding(embedding)


def test_wav2vec2_keeps_its_first_groupnorm():
    transformers = pytest.importorskip("transformers")
    model, inputs = wav2vec2()
    first = model.feature_extractor.conv_layers[0].layer_norm
    convert_norms(model, exclude=["feature_projection.*"])
    assert model.feature_extractor.conv_layers[0].layer_norm is first
    assert isinstance(first, nn.GroupNorm)
    assert isinstance(model.feature_projection.layer_norm, nn.LayerNorm)
    assert isinstance(model(**inputs), transformers.modeling_outputs.Wav2Vec2BaseModelOutput)


def test_the_norms_of_wav2vec2s_feature_encoder_can_be_kept():
    model, _ = wav2vec2(True, "layer")
    sites = convert_norms(model, exclude=["*feature_*"])
    assert [site.name.partition(".")[0] for site in sites] == ["encoder"] * 5
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert len(kept) == 4 and all(name.startswith("feature_") for name in kept)


def test_a_llamas_rules_go_with_sites_that_are_left_out():
    model, _ = llama()
    sites = convert_norms(model, types=["rmsnorm"], rules=llama_rules(4096), exclude=["attention"])
    assert {(site.role, site.alpha_init) for site in sites} == {("feed_forward", 0.2), ("final", 0.2)}


def test_dits_norms_have_no_weight_of_their_own_and_get_none():
    model, _ = dit()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    sites = convert_norms(model)
    layers = [module for module in model.modules() if isinstance(module, PointWise)]
    assert [(layer.weight, layer.bias) for layer in layers] == [(None, None)] * len(sites)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.items())  # adaLN's among them


def test_a_zero_start_is_taken_back_for_dyt():
    model, inputs = dit()
    out, modulation = model.proj_out_2, model.transformer_blocks[0].norm1.linear
    for layer in (out, modulation):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert output(model, inputs).abs().max() == 0
    assert end_zero_init(model) == ["transformer_blocks.0.norm1.linear", "proj_out_2"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"transformer_blocks.0.norm1.linear.weight", "proj_out_2.weight"}
    assert output(model, inputs).abs().max() > 0
    assert end_zero_init(model) == []


def test_a_zero_start_is_taken_back_in_any_memory_format():
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    nn.init.zeros_(layer.weight)
    assert end_zero_init(nn.Sequential(layer)) == ["0"]
    assert layer.weight.abs().max() > 0
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


class Weird(nn.Module):
    """A norm by its name, and by nothing else."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class WeirdRMSNorm(Weird):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (1 + self.weight)


class WeirdLayerNorm(Weird):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight) * scale


class ImageLayerNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), as it is written by hand in many places."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        off = x - x.mean(1, keepdim=True)
        y = off / torch.sqrt(off.square().mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * y + self.bias[:, None, None]


@pytest.mark.parametrize("kind", [WeirdRMSNorm, WeirdLayerNorm])
def test_a_name_proves_nothing(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind(4), nn.LayerNorm(4))
    with pytest.raises(UserError, match=rf"first 1 \({kind.__name__}\)"):
        convert_norms(model, types=["rmsnorm", "layernorm"])
    assert type(model[1]) is kind
    assert isinstance(model[2], nn.LayerNorm)


def test_a_norm_written_by_hand_is_known_by_what_it_computes():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), ImageLayerNorm(6)).to(torch.float64).requires_grad_(False)
    state = torch.get_rng_state()
    weight = model[1].weight
    (site,) = convert_norms(model)
    assert (site.kind, site.num_channels, site.channels_last) == ("ImageLayerNorm", 6, False)
    assert (model[1].channel_axis, model[1].weight is weight) == (1, True)
    assert model[1].alpha.dtype == torch.float64
    assert torch.equal(state, torch.get_rng_state())
    with torch.device("meta"):
        model = nn.Sequential(ImageLayerNorm(6))
    assert convert_norms(model)[0].channels_last is False
    assert model[0].alpha.is_meta


def test_where_new_tensors_go_does_not_change_what_a_norm_is():
    """As within `with torch.device("cuda")`, or after torch.set_default_device."""
    with torch.device("meta"):
        model = nn.Sequential(ImageLayerNorm(6), RMSNorm(6))
        sites = convert_norms(model, types=["layernorm", "rmsnorm"])
    assert [(site.family, site.channels_last) for site in sites] == [("layernorm", False), ("rmsnorm", True)]


def test_what_is_wrong_is_said_in_a_line_and_nothing_is_touched():
    model, _ = llama()
    with pytest.raises(UserError, match=r"no LayerNorm to convert \(it has 7 LlamaRMSNorm\)"):
        convert_norms(model)
    with pytest.raises(UserError, match=r"norm\.rules: 'stem' matches no site"):
        convert_norms(model, types=["rmsnorm"], rules={"stem": 0.3})
    with pytest.raises(UserError, match="no GroupNorm to convert"):
        convert_norms(model, types=[nn.GroupNorm])
    assert not any(isinstance(module, PointWise) for module in model.modules())


def test_the_layers_stand_where_a_norm_stands():
    x = torch.linspace(-3, 3, 24).view(2, 3, 4)
    layer = DynamicTanh(4, alpha_init=0.8)
    assert torch.allclose(layer(x), torch.tanh(0.8 * x))
    assert torch.allclose(Derf(4)(x), torch.erf(0.5 * x))
    assert DynamicTanh(4, bias=False).bias is None
    first = DynamicTanh(3, channels_first=True, dtype=torch.float64)
    assert first(torch.ones(2, 3, 4, 4, dtype=torch.float64)).shape == (2, 3, 4, 4)
    assert list(dict(layer.named_parameters())) == ["alpha", "weight", "bias"]
    with pytest.raises(AttributeError, match="has no attribute 'dyt'"):
        dytrun.dyt  # noqa: B018


def test_the_library_needs_torch_alone():
    code = (
        "import sys; from dytrun import DynamicTanh, convert_norms; from torch import nn;"
        "convert_norms(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)));"
        "heavy = {'timm', 'hydra', 'omegaconf', 'wandb', 'torchvision', 'pydantic', 'transformers'};"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What is wrong, and what is said of it; in a process of its own, where no test's type checker speaks first.
WRONG = [
    ("norm='layernorm'", "norm: there is no 'layernorm'; there are dyt, derf,"),
    ("alpha_init='x'", "norm.alpha_init: 'x' is no alpha to start from"),
    ("alpha_init=float('nan')", "norm.alpha_init: nan is no alpha to start from"),
    ("alpha_init=-0.5", "norm.alpha_init: -0.5 is no alpha to start from"),
    ("rules={'*': 0}", "norm.rules: *: 0 is no alpha to start from"),
    ("rules=['*']", "norm.rules: ['*'] does not map patterns to alphas"),
    ("rules={'*@first': 1.0}", "norm.rules: '*@first' matches no site"),
    ("types='layernorm'", "norm.types: 'layernorm' is one, and a list is asked for"),
    ("types=['LayerNorm']", "norm.types: there is no 'LayerNorm'; there are layernorm, rmsnorm,"),
    ("types=[]", "norm.types: is empty"),
    ("exclude='1'", "norm.exclude: '1' is one, and a list is asked for"),
    ("norm='group', num_groups=0", "norm.num_groups: 0 is no number of groups"),
]
TRY = f"""
from torch import nn
from dytrun import DynamicTanh, UserError, convert_norms
def model():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
for options in ({", ".join(f"dict({options})" for options, _ in WRONG)}):
    left = model()
    try:
        convert_norms(left, **options)
    except UserError as error:
        assert [type(one) for one in left] == [type(one) for one in model()]
        print(error)
found = model()
convert_norms(found, "derf", alpha_init=1, rules={{"2": 2}}, shift_init=0)
print(found[1].alpha.item(), found[2].alpha.item(), DynamicTanh(4, alpha_init=1).alpha.dtype)
"""


def test_what_cannot_be_is_said_in_a_line_each_and_nothing_is_touched_and_whole_numbers_are_numbers():
    run = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    *lines, numbers = run.stdout.splitlines()
    assert len(lines) == len(WRONG), run.stdout
    for line, (_, said) in zip(lines, WRONG, strict=True):
        assert line.startswith(said)
    assert numbers == "1.0 2.0 torch.float32"
