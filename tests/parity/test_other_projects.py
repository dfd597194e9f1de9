"""Our exports in the other projects' own code: openpi's PyTorch model and LeRobot's policies load them and agree.

Each test runs where the project can be imported; `MANIPI_OPENPI` and `MANIPI_LEROBOT` may name their `src` folders.
openpi's model needs transformers 4.53.2 with openpi's `transformers_replace` copied over it; LeRobot's needs the
transformers that its extra `pi` asks for.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import ABSENT, CASES, find, over, read_json
from safetensors.torch import load_file, load_model, save_model

from manipi.errors import ConfigError
from manipi.exchange.exporting import export_checkpoint
from manipi.exchange.importing import import_checkpoint
from manipi.exchange.lerobot import read_stated
from manipi.model.config import Pi0Config, Pi05Config
from manipi.policy import Policy
from manipi.robots.robot import Joints, Robot, State
from manipi.train.config import ComputeConfig, DataConfig, TrainConfig
from manipi.weights.names import LEROBOT

FLOW = [case for case in CASES if case.recorded["kind"] in ("pi0", "pi05")]
pytestmark = [
    pytest.mark.skipif(not CASES, reason=ABSENT),
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]
BACKBONES = {"PaliGemmaForConditionalGeneration", "GemmaForCausalLM"}
BACKBONES |= {"PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"}
TOLERANCE = 3e-4
"""Of actions in float32, as for ours against the reference."""


@pytest.fixture
def load(monkeypatch):
    """`load(module)` imports one of their modules, or skips the test."""

    def load(module):
        project = module.partition(".")[0]
        if folder := os.environ.get(f"MANIPI_{project.upper()}"):
            monkeypatch.syspath_prepend(folder)
        reason = f"{module} and its dependencies cannot be imported (MANIPI_{project.upper()} may name its src)"
        return pytest.importorskip(module, reason=reason, exc_type=ImportError)

    return load


def sizes_of_stats(case):
    """Dimensions of the state and of the actions that the recorded checkpoint has statistics of."""
    (stats,) = case.folder.glob("ckpt_pure/assets/*/norm_stats.json")
    return [len(read_json(stats)["norm_stats"][key]["mean"]) for key in ("state", "actions")]


@pytest.fixture
def exported(tmp_path):
    """`exported(case, layout)` is the recorded checkpoint, imported and exported; its first actions may be relative."""

    def export(case, layout, relative=0):
        state, actions = sizes_of_stats(case)
        robot = Robot(
            name=next(case.folder.glob("ckpt_pure/assets/*")).name,
            cameras={slot: slot for slot in case.cameras},
            state=(State("state", state),),
            actions=(Joints(relative, relative=True), Joints(actions - relative)) if relative else (Joints(actions),),
        )
        words = next(path for path in find("tokenizer/*.model") if path.is_relative_to(case.folder.parents[1]))
        recipe = TrainConfig(
            robot=robot,
            data=DataConfig(path="none"),
            model=case.config,
            compute=ComputeConfig(precision="fp32"),
            tokenizer=str(words),
            action_tokenizer="binning",
            norm_mode="zscore" if isinstance(case.config, Pi0Config) else "quantile",
        )
        # The recorded prompts are short; the certificate's, with a chunk of actions, is not.
        longest = 200 + case.config.action_horizon * actions
        import_checkpoint(case.folder / "ckpt_pure", tmp_path / "ours", recipe=recipe, max_token_len=longest)
        export_checkpoint(tmp_path / "ours", layout, tmp_path / "theirs")
        return tmp_path / "theirs"

    return export


@pytest.fixture
def shrink(monkeypatch):
    """`shrink(module, config)` makes their module, which knows the released sizes alone, build the config's."""

    def shrink(module, ours):
        for name in BACKBONES & vars(module).keys():
            build = getattr(module, name)
            monkeypatch.setattr(module, name, lambda config, build=build: build(_resize(config, ours)))

    return shrink


def _resize(theirs, ours):
    theirs.vocab_size = ours.vocab_size
    if not hasattr(theirs, "vision_config"):
        return theirs
    theirs._vocab_size = theirs.image_token_index = theirs.text_config.vocab_size = ours.vocab_size
    vision = theirs.vision_config
    vision.hidden_size, vision.intermediate_size = ours.vision.width, ours.vision.mlp_dim
    vision.num_hidden_layers, vision.num_attention_heads = ours.vision.depth, ours.vision.num_heads
    vision.image_size, vision.patch_size = ours.vision.image_size, ours.vision.patch_size
    vision.projection_dim = ours.vlm.width
    return theirs


def sizes_of(config):
    return {"gemma_2b": config.vlm, "gemma_300m": getattr(config, "action_expert", None)}.__getitem__


@over("case", values=FLOW)
def test_openpi_loads_our_export(case, exported, shrink, load, measure, monkeypatch):
    module, gemma = load("openpi.models_pytorch.pi0_pytorch"), load("openpi.models.gemma")
    monkeypatch.setattr(gemma, "get_config", sizes_of(case.config))
    parts = load("openpi.models_pytorch.gemma_pytorch")
    shrink(parts, case.config)
    model = module.PI0Pytorch(
        SimpleNamespace(
            pi05=isinstance(case.config, Pi05Config),
            paligemma_variant="gemma_2b",
            action_expert_variant="gemma_300m",
            dtype="float32",
            action_dim=case.config.action_dim,
            action_horizon=case.config.action_horizon,
            pytorch_compile_mode=None,
        )
    ).eval()
    folder = exported(case, "openpi-torch")
    load_model(model, folder / "model.safetensors", strict=True)  # as openpi's load_pytorch does
    save_model(model, str(folder / "again.safetensors"))
    ours, theirs = (load_file(folder / f"{name}.safetensors") for name in ("model", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        actions = model.sample_actions("cpu", openpi_observation(case), case.tensor("init_noise"))
    measure("openpi's PyTorch, our export: actions", _error(actions, case.outputs["actions_10"]), TOLERANCE)
    mine = case.model().sample(case.batch(), case.tensor("init_noise"), 10)
    measure("openpi's PyTorch against ours: actions", _error(actions, mine), TOLERANCE)


def _error(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def openpi_observation(case):
    return SimpleNamespace(
        images={name: case.tensor(f"image/{name}").permute(0, 3, 1, 2) for name in case.cameras},
        image_masks={name: case.tensor(f"image_mask/{name}") for name in case.cameras},
        state=case.tensor("state"),
        tokenized_prompt=case.tensor("tokenized_prompt"),
        tokenized_prompt_mask=case.tensor("tokenized_prompt_mask"),
        token_ar_mask=None,
        token_loss_mask=None,
    )


@pytest.fixture
def lerobot_policy(load, shrink, monkeypatch):
    """`lerobot_policy(case, folder)`: LeRobot's policy from the folder, all of whose tensors it must know and find."""

    def build(case, folder, capsys):
        load("lerobot.policies.factory")
        kind = case.recorded["kind"]
        module = load(f"lerobot.policies.{kind}.modeling_{kind}")
        monkeypatch.setattr(module, "get_gemma_config", sizes_of(case.config))
        shrink(module, case.config)
        if kind == "pi0_fast":  # it asks for tokenizers from the Hub, which no test here needs
            for name in ("AutoTokenizer", "AutoProcessor"):
                monkeypatch.setattr(module, name, SimpleNamespace(from_pretrained=lambda *_, **__: None))
        name = {"pi0": "PI0Policy", "pi05": "PI05Policy", "pi0_fast": "PI0FastPolicy"}[kind]
        policy = getattr(module, name).from_pretrained(folder).eval()
        assert "All keys loaded successfully!" in capsys.readouterr().out
        return policy

    return build


@over("case", values=FLOW)
def test_lerobot_loads_our_export(case, exported, lerobot_policy, measure, capsys):
    policy = lerobot_policy(case, exported(case, "lerobot"), capsys)
    actions = policy.model.sample_actions(
        *images_of(case),
        *(case.tensor(f"tokenized_prompt{name}") for name in ("", "_mask")),
        case.tensor("state"),
        noise=case.tensor("init_noise"),
    )
    measure("LeRobot, our export: actions", _error(actions, case.outputs["actions_10"]), TOLERANCE)


@pytest.mark.parametrize("relative", [0, 4], ids=["absolute", "relative"])
@over("case", values=FLOW)
@torch.no_grad()
def test_lerobot_answers_as_we_do(case, relative, exported, lerobot_policy, load, measure, capsys):
    """From pictures, state and words to commands, through the processors that LeRobot finds in our export."""
    state, actions = sizes_of_stats(case)
    if relative and state < actions:
        with pytest.raises(ConfigError, match=f"a state of {state} dimensions, which is shorter than the {actions} of"):
            exported(case, "lerobot", relative)
        return
    folder = exported(case, "lerobot", relative)
    ours, theirs = Policy.load(folder.parent / "ours"), lerobot_policy(case, folder, capsys)
    before, after = load("lerobot.policies.factory").make_pre_post_processors(
        theirs.config,
        pretrained_path=str(folder),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer": transformers_like(ours.tokenizers.text)}},
    )
    rng = np.random.default_rng(0)
    state, noise = rng.normal(size=ours.robot.state_size).astype(np.float32), case.tensor("init_noise")[:1]
    size = case.config.vision.image_size
    pictures = {slot: rng.integers(0, 256, (size, size, 3), np.uint8) for slot in case.cameras}
    mine = ours.infer({**pictures, "state": state, "prompt": "push the cube"}, noise[0].numpy())["actions"]
    seen = {f"observation.images.{slot}": torch.tensor(p).permute(2, 0, 1) / 255 for slot, p in pictures.items()}
    batch = before({**seen, "observation.state": torch.from_numpy(state), "task": "push the cube"})
    commands = after(theirs.predict_action_chunk(batch, noise=noise))[0]
    measure("LeRobot, our export: commands", _error(commands, mine) / float(np.ptp(mine)), TOLERANCE)


@pytest.mark.parametrize("exclude", [["gripper"], [], ["joint"]])
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_what_lerobot_saves_is_what_we_read(kind, exclude, load, tmp_path):
    """Config and processors as LeRobot itself writes them, and what its own steps do to a number."""
    load("lerobot.policies.factory")
    configs = load(f"lerobot.policies.{kind}.configuration_{kind}")
    features, processor = load("lerobot.configs"), load(f"lerobot.policies.{kind}.processor_{kind}")
    tokenizers = load("lerobot.processor.tokenizer_processor")
    names = ["joint_1", "joint_2", "Left_Gripper"]
    config = getattr(configs, f"{kind.upper()}Config")(
        device="cpu",
        chunk_size=12,
        n_action_steps=5,
        num_inference_steps=7,
        use_relative_actions=True,
        relative_exclude_joints=exclude,
        action_feature_names=names,
        input_features={
            "observation.images.front": features.PolicyFeature(type=features.FeatureType.VISUAL, shape=(3, 224, 224)),
            "observation.state": features.PolicyFeature(type=features.FeatureType.STATE, shape=(3,)),
        },
        output_features={"action": features.PolicyFeature(type=features.FeatureType.ACTION, shape=(3,))},
    )
    one = {name: torch.full((3,), value) for name, value in (("mean", 0.0), ("std", 1.0), ("q01", -1.0), ("q99", 1.0))}
    with pytest.MonkeyPatch.context() as patched:  # the tokenizer is on the Hub only
        words = SimpleNamespace(save_pretrained=lambda folder: (folder.mkdir(), (folder / "x").touch()))
        patched.setattr(tokenizers, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: words))
        make = getattr(processor, f"make_{kind}_pre_post_processors")
        before, after = make(config, {"observation.state": one, "action": one})
    for one in (config, before, after):
        one.save_pretrained(tmp_path)
    stated = read_stated(SimpleNamespace(path=tmp_path, layout=LEROBOT))
    assert {name: said.value for name, said in stated.said.items() if name in ("action_horizon", "max_token_len")} == {
        "action_horizon": 12,
        "max_token_len": {"pi0": 48, "pi05": 200}[kind],
    }
    assert (stated.get("num_steps"), stated.get("norm_mode")) == (7, {"pi0": "zscore", "pi05": "quantile"}[kind])
    assert stated.get("pictures") == ("observation.images.front",)
    step = next(step for step in before.steps if type(step).__name__ == "RelativeActionsProcessorStep")
    theirs = step._build_mask(3)
    ours = stated.get("relative")
    assert theirs == ([True] * 3 if ours is True else list(ours))


def transformers_like(words):
    """The call of a transformers tokenizer, for PaliGemma's is on the Hub only."""

    def encode(texts, *, max_length, **_):
        ids = torch.full((len(texts), max_length), words.pad_id)
        valid = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            encoded = [words.bos_id, *words.encode(text)]
            ids[row, : len(encoded)], valid[row, : len(encoded)] = torch.tensor(encoded), 1
        return {"input_ids": ids, "attention_mask": valid}

    return encode


@over("case", values=[case for case in CASES if case.recorded["kind"] == "pi0_fast"])
@torch.no_grad()
def test_lerobot_loads_our_fast_export(case, exported, lerobot_policy, measure, capsys):
    """The first token's logits; LeRobot goes on otherwise than openpi, with a second BOS before the actions."""
    model = lerobot_policy(case, exported(case, "lerobot"), capsys).model
    tokens, valid = (case.tensor(f"decode/tokenized_prompt{name}") for name in ("", "_mask"))
    embedded, pads, attention, *_ = model.embed_prefix_fast(*images_of(case), tokens, valid)
    part = model.paligemma_with_expert
    (out, _), _ = part.forward(
        attention_mask=torch.where(attention[:, None], 0.0, -2.3819763e38),
        position_ids=torch.cumsum(pads, dim=1) - 1,
        inputs_embeds=[embedded, None],
        use_cache=False,
    )
    last = pads.shape[1] - tokens.shape[1] + valid.sum(1) - 1
    logits = part.paligemma.lm_head(out[torch.arange(len(out)), last])
    measure("LeRobot, our export: FAST logits", _error(logits, case.outputs["decode/logits"][:, 0]), 1e-4)


def images_of(case):
    images = [case.tensor(f"image/{name}").permute(0, 3, 1, 2) for name in case.cameras]
    return images, [case.tensor(f"image_mask/{name}") for name in case.cameras]
