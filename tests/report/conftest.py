"""One fine-tune as the report's tests see it: a run, its adapter, a comparison, a merge, and two verdicts."""

from __future__ import annotations

import math
import random
from typing import TypedDict

import pytest

from tunesmith.adapter.records import AdapterFacts, Binding, LowRank, ModuleFacts
from tunesmith.compare import (
    Candidate,
    CheckpointChoice,
    Comparison,
    Estimate,
    Evaluation,
    Figure,
    Measure,
    Reply,
    Score,
    VariantInfo,
)
from tunesmith.compare.intervals import verdict as verdict_of
from tunesmith.conversations import Conversation, Message
from tunesmith.merge.records import Asset, Ingredient, Kept, Merged, MergePlan, Receipt, ShardPlan, TensorFidelity
from tunesmith.models import Capabilities, GenerationSettings
from tunesmith.record import Finding, Value
from tunesmith.runs import LogRow, Overruled, Run, RunCheckpoint, RunFile, Setting
from tunesmith.verify import BehaviourRow, Level, TensorVerdict, Verdict

LAYERS = 30
TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODULES = [f"model.layers.{layer}.{target}" for layer in range(LAYERS) for target in TARGETS]

QUESTIONS = (
    (
        "Someone left a comment field open on our blog and now there are links in it. What should I do?",
        "Visitors may be led to phishing pages. You should remove the links and hold new comments for review. You can "
        'also add rel="nofollow" and a captcha to the comment form.',
        "Finding: stored link spam through an unmoderated comment form.\nRisk: low, but visitors may be led to "
        'phishing pages.\nDo now: remove the links and hold new comments for review.\nDo next: add rel="ugc '
        'nofollow" and a captcha to the comment form.',
        "Finding: unmoderated comment form, abused for link spam.\nRisk: low.\nDo now: delete the links and switch "
        'moderation on.\nDo next: add a captcha and rel="ugc nofollow".',
    ),
    (
        "我们的登录接口没有限制尝试次数，这严重吗？",
        "这可能是一个问题。您可以考虑限制登录尝试次数，以提高系统的安全性。您也可以使用验证码。",
        "发现：登录接口可被暴力破解。\n风险：高，弱口令账号会被直接登录。\n"
        "立即处理：同一账号 15 分钟内失败 5 次即锁定。\n后续：启用验证码与双因素认证。",
        "发现：登录接口缺少次数限制，可被暴力破解。\n风险：高。\n立即处理：限制失败次数并告警。\n后续：启用双因素认证。",
    ),
    (
        "Is it fine to keep the database password in the repository if the repository is private?",
        "It is generally not recommended to keep passwords in a repository, even if the repository is private. A "
        "private repository can be accessed by anyone who has access to it, and the password will stay in the history "
        "of the repository. You should use environment variables or a secret manager to store passwords, and you "
        "should change it if it has been committed. You should also make sure that the people who have access",
        "Finding: a secret is kept in version control.\nRisk: medium, every clone and every backup holds it.\nDo now: "
        "change the password and move it to a secret manager.\nDo next: remove it from the history and scan commits "
        "for secrets.",
        None,
    ),
    (
        "What does rel=nofollow do?",
        "It tells search engines not to follow the link.",
        "It tells search engines not to follow the link.",
        None,
    ),
    (
        "How long should session cookies live?",
        "Session cookies should live for as long as the session lasts, usually until the browser is closed.",
        "Finding: session lifetime is a policy question.\nRisk: low.\nDo now: 30 minutes of idleness, 12 hours in all."
        "\nDo next: rotate the session id at every sign-in.",
        "Finding: session lifetime.\nRisk: low.\nDo now: 30 minutes idle, 12 hours absolute.\nDo next: rotate the id.",
    ),
)


STRUCTURE = (Finding(code="structure_ok", severity="ok", params={"tensors": 272, "shards": 1}),)
ASSETS = (
    Finding(code="config_same", severity="ok", params={"fields": 27}),
    Finding(code="tokenizer_same", severity="ok", params={"probes": 8}),
    Finding(code="chat_template_same", severity="ok"),
    Finding(code="generation_config_same", severity="ok"),
)
WEIGHTS = (
    Finding(
        code="weights_proven",
        severity="ok",
        params={"elements": 69_708_672, "exact": 69_702_162, "faithful": 2310, "twice_rounded": 4200, "outside": 0},
    ),
    Finding(code="weights_unchanged_share", severity="info", params={"share_unchanged": 0.524, "tensors": 210}),
)
BEHAVIOUR = (
    Finding(code="behaviour_close", severity="ok", params={"mean_kl": 7.7e-4, "base_kl": 1.43, "limit": 7.8e-4}),
    Finding(code="behaviour_texts", severity="ok", params={"same": 5, "ties": 0, "total": 5, "agreement": 1.0}),
)


def noise_of(seed: int) -> random.Random:
    """Repeatable noise for the samples."""
    return random.Random(seed)  # noqa: S311 - no secret depends on it


class Parts(TypedDict):
    """The arguments of a report."""

    run: Run
    adapter: AdapterFacts | None
    comparison: Comparison | None
    merged: Merged | None
    verdict: Verdict | None


def make_log(seed: int = 7) -> tuple[LogRow, ...]:
    """Sixty steps whose loss falls, logged at every step, with held-out loss at every twentieth."""
    noise = noise_of(seed)
    rows: list[LogRow] = []
    for step in range(1, 61):
        loss = 0.62 + 2.5 * math.exp(-step / 13) + noise.gauss(0, 0.11)
        rate = 5e-4 * min(1.0, step / 6) * 0.5 * (1 + math.cos(math.pi * step / 60))
        rows.append(LogRow(step=step, epoch=step / 20, loss=loss, learning_rate=rate, sources=("trainer_log.jsonl",)))
        if step % 10 == 0:
            held_out = 0.86 + 2.1 * math.exp(-step / 15) + 0.011 * max(0, step - 40)
            rows.append(LogRow(step=step, epoch=step / 20, eval_loss=held_out, sources=("trainer_log.jsonl",)))
    return tuple(rows)


def make_files() -> tuple[RunFile, ...]:
    """A run directory with three checkpoints."""
    mib = 1024 * 1024
    always = [
        ("adapter_model.safetensors", 19_593_528, "adapter_weights", "inference"),
        ("adapter_config.json", 1_043, "adapter_config", "inference"),
        ("tokenizer.json", 3_519_811, "tokenizer", "inference"),
        ("tokenizer_config.json", 3_764, "tokenizer_config", "inference"),
        ("chat_template.jinja", 373, "chat_template", "inference"),
    ]
    root = [
        ("README.md", 5_211, "model_card", "record"),
        ("all_results.json", 212, "results", "record"),
        ("trainer_log.jsonl", 11_402, "trainer_log", "record"),
        ("trainer_state.json", 12_030, "trainer_state", "record"),
        ("training_args.bin", 6_289, "training_args_bin", "record"),
        ("training_loss.png", 41_239, "loss_chart", "record"),
        ("held_out.jsonl", 8_120, "held_out", "record"),
        ("tunesmith_run.json", 3_310, "manifest", "record"),
        ("notes from Li.docx", 18_220, "unknown", "unknown"),
    ]
    saved = [
        ("optimizer.pt", 37 * mib, "optimizer", "resuming"),
        ("scheduler.pt", 1_465, "scheduler", "resuming"),
        ("rng_state.pth", 14_645, "rng_state", "resuming"),
        ("trainer_state.json", 8_804, "trainer_state", "resuming"),
        ("training_args.bin", 6_289, "training_args_bin", "record"),
    ]
    listed = always + root
    for step in (20, 40, 60):
        listed += [(f"checkpoint-{step}/{name}", size, kind, need) for name, size, kind, need in always + saved]
    return tuple(
        RunFile.model_validate({"path": path, "size_bytes": size, "kind": kind, "needed_for": need})
        for path, size, kind, need in listed
    )


def recorded(**values: Value) -> tuple[Setting, ...]:
    """Settings of the manifest; of the learning rate another file says otherwise."""
    other = Overruled(value=1e-4, source="training_args.yaml")
    return tuple(
        Setting(
            name=name,
            value=value,
            source="tunesmith_run.json",
            overruled=(other,) if name == "learning_rate" else (),
        )
        for name, value in values.items()
    )


@pytest.fixture
def run() -> Run:
    """A healthy run of sixty steps."""
    path = "/data/models/security007"
    log = make_log()
    losses = {row.step: row.loss for row in log if row.loss is not None}
    held_out = {row.step: row.eval_loss for row in log if row.eval_loss is not None}
    saved = [
        RunCheckpoint(
            name=f"checkpoint-{step}",
            step=step,
            path=f"{path}/checkpoint-{step}",
            loss=losses[step],
            eval_loss=held_out[step],
            is_best=step == 40,
        )
        for step in (20, 40, 60)
    ]
    final = RunCheckpoint(name="final", step=60, path=path, loss=losses[60], eval_loss=held_out[60])
    return Run(
        path=path,
        kind="run",
        writer="tunesmith",
        base_model=BASE,
        base_sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        files=make_files(),
        checkpoints=(*saved, final),
        log=log,
        settings=recorded(
            dataset="security_reports.jsonl",
            train_rows=320,
            held_out_rows=40,
            seed=42,
            learning_rate=5e-4,
            num_train_epochs=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            lr_scheduler_type="cosine",
            warmup_ratio=0.1,
            lora_dropout=0.0,
            max_grad_norm=1.0,
            bf16=True,
            version_torch="2.13.0",
            version_transformers="5.6.2",
            version_peft="0.18.1",
            version_tunesmith="0.1.0",
        ),
        findings=(Finding(code="overfitting", severity="warning", params={"step": 40, "best": 1.006, "last": 1.118}),),
        metrics={"train_loss": 1.0231, "eval_loss": 0.9512, "train_runtime": 312.4, "train_samples_per_second": 3.07},
        held_out="held_out.jsonl",
    )


@pytest.fixture
def adapter(run: Run) -> AdapterFacts:
    """A rank-8 adapter on every linear layer."""
    noise = noise_of(3)
    modules = tuple(
        ModuleFacts(
            module=name,
            r=8,
            scaling=2.0,
            delta_norm=0.06 + 0.2 * noise.random() + 0.004 * index,
            base_norm=32.0,
            effective_rank=4 + 3 * noise.random(),
        )
        for index, name in enumerate(MODULES)
    )
    return AdapterFacts(
        path=run.path,
        base_model=BASE,
        peft_type="LORA",
        r=8,
        lora_alpha=16,
        scaling=2.0,
        use_rslora=False,
        target_modules=tuple(sorted(target.split(".")[1] for target in TARGETS)),
        modules=modules,
        measured=len(modules),
        parameters=4_884_480,
        dtype="F32",
        size_bytes=19_593_528,
        relative_update=0.00312,
    )


def conversations() -> list[Conversation]:
    """The five questions, three of them with an answer."""
    rows = []
    for index, (question, _, _, answer) in enumerate(QUESTIONS):
        turns = [Message(role="user", content=question)]
        if answer:
            turns.append(Message(role="assistant", content=answer))
        rows.append(Conversation(id=f"row-{index}", messages=tuple(turns)))
    return rows


@pytest.fixture
def comparison() -> Comparison:
    """Base against the final adapter, whose style is plain to see."""
    replies = []
    for index, (_, before, after, _) in enumerate(QUESTIONS):
        cut = index == 2
        replies.append(
            Reply(
                prompt_id=f"row-{index}",
                variant="base",
                text=before,
                tokens=128 if cut else len(before) // 4,
                stop_reason="length" if cut else "eos",
            )
        )
        replies.append(
            Reply(prompt_id=f"row-{index}", variant="final", text=after, tokens=len(after) // 4, stop_reason="eos")
        )
    return Comparison(
        run="security007",
        variants=(
            VariantInfo(name="base", kind="base", path=f"/models/{BASE}"),
            VariantInfo(name="final", kind="adapter", path="/data/models/security007"),
        ),
        prompts=tuple(conversations()),
        replies=tuple(replies),
        scores=(
            Score(variant="base", rows=40, tokens=2816, loss=2.1473),
            Score(
                variant="checkpoint-20",
                rows=40,
                tokens=2816,
                loss=1.4212,
                difference=-0.7261,
                difference_low=-0.8102,
                difference_high=-0.6420,
                better_rows=39,
            ),
            Score(
                variant="final",
                rows=40,
                tokens=2816,
                loss=0.9371,
                difference=-1.2102,
                difference_low=-1.3054,
                difference_high=-1.1150,
                better_rows=40,
            ),
        ),
        settings=GenerationSettings(max_new_tokens=128, greedy=True),
        engine=Capabilities(kind="local", where="cpu", dtype="float32"),
    )


@pytest.fixture
def merged(run: Run) -> Merged:
    """A merge into bfloat16 in one shard."""
    noise = noise_of(5)
    names = [f"{module}.weight" for module in MODULES]
    updates = tuple(
        LowRank(name=name, module=module, r=8, scaling=2.0, lora_A=f"{module}.lora_A", lora_B=f"{module}.lora_B")
        for name, module in zip(names, MODULES, strict=True)
    )
    plan = MergePlan(
        adapters=(Ingredient(run=run.path, checkpoint="final", adapter=run.path),),
        base_model=BASE,
        base=f"/models/{BASE}",
        out="/data/save/SmolLM2-135M-Security",
        dtype="BF16",
        rounding="faithful",
        rounded={"faithful": len(names)},
        binding=Binding(updates=updates),
        shards=(ShardPlan(filename="model.safetensors", size_bytes=269_060_552, tensors=272, changed=tuple(names)),),
        assets=(
            Asset(filename="tokenizer.json", source=f"{run.path}/tokenizer.json", origin="run"),
            Asset(filename="chat_template.jinja", source=f"{run.path}/chat_template.jinja", origin="run"),
            Asset(filename="config.json", source="/models/config.json", origin="base"),
        ),
        write_bytes=272_600_000,
        memory_bytes=4_000_000,
        warnings=(Finding(code="rounding_faithful", severity="info", params={"tensors": len(names)}),),
    )
    fidelities = tuple(
        TensorFidelity(
            name=name,
            elements=331_776,
            share_unchanged=0.45 + 0.15 * noise.random(),
            relative_error=0.85 + 0.3 * noise.random(),
            gain=0.999 + 0.001 * noise.random(),
            error_inside=0.01 + 0.01 * noise.random(),
            rounding="faithful",
            nearest=Kept(share_unchanged=0.52, relative_error=0.6, gain=0.95, error_inside=0.05),
        )
        for name in names
    )
    sha256 = "e2d1b4b7a1c0f7c4a3bb2b7a5a2f9d0c61f9c9f6f3b6a9d8e7c6b5a493827160"
    receipt = Receipt(filename="model.safetensors", size_bytes=269_060_552, sha256=sha256, tensors=fidelities)
    return Merged(
        plan=plan,
        receipts=(receipt,),
        seconds=1.62,
        kept=Kept(share_unchanged=0.524, relative_error=0.912, gain=0.9971, error_inside=0.0123),
        nearest=Kept(share_unchanged=0.561, relative_error=0.634, gain=0.9432, error_inside=0.0789),
    )


def tensor_verdicts(*, wrong: frozenset[str] = frozenset()) -> tuple[TensorVerdict, ...]:
    """Every tensor of the merged model; those in ``wrong`` never received their update."""
    noise = noise_of(11)
    rows = []
    for module in MODULES:
        elements = 331_776
        bad = module in wrong
        rows.append(
            TensorVerdict(
                name=f"{module}.weight",
                module=module,
                elements=elements,
                exact=int(elements * 0.52) if bad else elements - 31,
                faithful=0 if bad else 11,
                twice_rounded=0 if bad else 20,
                outside=elements - int(elements * 0.52) if bad else 0,
                unchanged=elements if bad else int(elements * (0.45 + 0.15 * noise.random())),
                gain=0.0 if bad else 0.99 + 0.01 * noise.random(),
                relative_error=1.0 if bad else 0.35 + 0.35 * noise.random(),
            )
        )
    for index in range(62):
        rows.append(
            TensorVerdict(
                name=f"model.layers.{index // 2}.norm_{index % 2}.weight",
                module=None,
                elements=576,
                exact=576,
                faithful=0,
                twice_rounded=0,
                outside=0,
                unchanged=576,
            )
        )
    return tuple(rows)


def behaviour(*, broken: bool) -> tuple[BehaviourRow, ...]:
    """The five questions, answered by adapter and merge."""
    rows = []
    for index, (question, before, after, _) in enumerate(QUESTIONS):
        differs = broken and index != 3
        rows.append(
            BehaviourRow(
                prompt_id=f"row-{index}",
                question=question,
                tokens=len(after) // 4,
                mean_kl=0.41 + 0.1 * index if differs else 6.2e-4 + 1e-4 * index,
                base_kl=1.31 + 0.07 * index,
                max_logit_difference=9.4 if differs else 0.31,
                top1_agreement=0.71 if differs else 1.0,
                same_text=not differs,
                first_difference=index if differs else None,
                adapter_text=after,
                merged_text=before if differs else after,
            )
        )
    return tuple(rows)


@pytest.fixture
def good_verdict() -> Verdict:
    """Everything checked, rounding apart nothing found."""
    return Verdict(
        run="security007",
        merged="SmolLM2-135M-Security",
        checkpoint="final",
        base_model=BASE,
        answer="equal_within_rounding",
        levels=(
            Level(name="structure", status="pass", findings=STRUCTURE, seconds=0.04),
            Level(name="assets", status="pass", findings=ASSETS, seconds=0.21),
            Level(name="weights", status="pass", findings=WEIGHTS, seconds=3.9),
            Level(name="behaviour", status="pass", findings=BEHAVIOUR, seconds=75),
        ),
        tensors=tensor_verdicts(),
        behaviour=behaviour(broken=False),
        dtype="float32",
    )


@pytest.fixture
def bad_verdict() -> Verdict:
    """Half of the modules never received their update."""
    wrong = frozenset(module for module in MODULES if "mlp" in module or module.startswith("model.layers.1."))
    partly = Finding(
        code="cause_partly_applied",
        severity="error",
        params={"modules": "gate_proj, up_proj, down_proj", "count": len(wrong)},
    )
    outside = Finding(
        code="cause_tensors_outside",
        severity="error",
        params={"count": len(wrong), "worst": "model.layers.0.mlp.gate_proj.weight"},
    )
    template = Finding(code="cause_chat_template", severity="warning")
    return Verdict(
        run="security007",
        merged="SmolLM2-135M-Security",
        checkpoint="final",
        base_model=BASE,
        answer="different",
        levels=(
            Level(name="structure", status="pass", findings=STRUCTURE, seconds=0.04),
            Level(name="assets", status="warn", findings=(*ASSETS[:2], template), seconds=0.21),
            Level(name="weights", status="fail", findings=(outside, partly), seconds=3.9),
            Level(name="behaviour", status="skipped", findings=(), seconds=0),
        ),
        causes=(partly, template),
        tensors=tensor_verdicts(wrong=wrong),
        behaviour=behaviour(broken=True),
        dtype="float32",
    )


@pytest.fixture
def parts(run: Run, adapter: AdapterFacts, comparison: Comparison, merged: Merged, good_verdict: Verdict) -> Parts:
    """A complete report's arguments."""
    return {"run": run, "adapter": adapter, "comparison": comparison, "merged": merged, "verdict": good_verdict}


@pytest.fixture
def choice() -> CheckpointChoice:
    """The base and three checkpoints, of which the second is taken; ``final`` is the third's copy."""
    losses = {"base": 2.0, "checkpoint-20": 1.4, "checkpoint-40": 1.1, "checkpoint-60": 1.15}
    candidates = [
        Candidate(
            name=name,
            step=int(name.partition("-")[2]) if "-" in name else None,
            loss=Estimate(value=loss, low=loss - 0.05, high=loss + 0.05),
            to_best=None if name == "checkpoint-40" else Estimate(value=loss - 1.1, low=loss - 1.12, high=loss - 1.08),
            trainers_best=name == "checkpoint-60",
            answer_tokens=120.0 if name == "checkpoint-40" else None,
        )
        for name, loss in losses.items()
    ]
    return CheckpointChoice(
        run="run",
        candidates=(*candidates, Candidate(name="final", step=60, same_as="checkpoint-60")),
        recommended="checkpoint-40",
        reason=Finding(code="run_unfinished", severity="info", params={"checkpoint": "checkpoint-40"}),
        best="checkpoint-40",
        rows_from="held_out",
        rows=40,
        tokens=2_000,
    )


def measured(
    section: str,
    name: str,
    base: float,
    value: float,
    *,
    unit: str,
    better: bool | None,
    half: float | None = 0.1,
    about: str = "",
    rows: int = 24,
    variants: tuple[str, ...] = ("final",),
) -> Measure:
    """A measure of the base and of variants, whose differences have intervals of that half width."""

    def around(middle: float) -> Estimate:
        return Estimate(value=middle) if half is None else Estimate(value=middle, low=middle - half, high=middle + half)

    change = around(value / base - 1 if unit == "perplexity" else value - base)
    figures = [
        Figure(variant=one, value=around(value), difference=change, verdict=verdict_of(change, better))
        for one in variants
    ]
    return Measure.model_validate(
        {
            "section": section,
            "name": name,
            "about": about,
            "unit": unit,
            "higher_is_better": better,
            "rows": rows,
            "figures": [Figure(variant="base", value=around(base)), *figures],
        }
    )


def of_itself(name: str, value: float, *, unit: str, variants: tuple[str, ...] = ("final",)) -> Measure:
    """A measure that is itself a difference, so that none to the base is taken."""
    figures = tuple(
        Figure(variant=one, value=Estimate(value=value, low=value - 0.05, high=value + 0.05)) for one in variants
    )
    return Measure.model_validate(
        {
            "section": "memorisation",
            "name": name,
            "unit": unit,
            "higher_is_better": None,
            "rows": 20,
            "figures": figures,
        }
    )


def evaluation_of(variants: tuple[str, ...] = ("final",)) -> Evaluation:
    """An evaluation that helped, forgot some Chinese, is cut more often, and knows one training answer by heart."""
    named = {"variants": variants}
    measures = (
        measured("effect", "loss", 2.514, 1.203, unit="nats", better=False, **named),
        measured("effect", "perplexity", 12.35, 3.33, unit="perplexity", better=False, **named),
        measured("effect", "bleu", 8.4, 8.45, unit="points", better=True, half=2.0, rows=6, **named),
        measured("effect", "length", 1.9, 1.1, unit="ratio", better=None, rows=6, **named),
        measured("effect", "judges:polite", 0.2, 0.25, unit="score", better=True, half=None, rows=6, **named),
        measured("damage", "general_loss", 2.9, 2.895, unit="nats", better=False, about="en", **named),
        measured("damage", "general_loss", 3.1, 3.402, unit="nats", better=False, about="zh", **named),
        of_itself("overfit_gap", 0.21, unit="nats", variants=variants).model_copy(
            update={"section": "damage", "name": "general_kl", "about": "zh"}
        ),
        measured("damage", "cut", 0.05, 0.35, unit="share", better=False, rows=60, **named),
        of_itself("verbatim_trained", 0.1, unit="share", variants=variants),
        of_itself("overfit_gap", 0.42, unit="nats", variants=variants),
    )
    told = {"name": variants[-1], "rows": 24, "low": -1.411, "high": -1.211}
    findings = (
        Finding(
            code="evaluation_forgot",
            severity="warning",
            params={**told, "about": "zh", "value": 3.402, "base": 3.1, "low": 0.202, "high": 0.402},
        ),
        Finding(
            code="evaluation_more_cut",
            severity="warning",
            params={**told, "rows": 60, "value": 0.35, "base": 0.05, "low": 0.2, "high": 0.4},
        ),
        Finding(code="engine_rounds", severity="info", params={"dtype": "bfloat16"}),
        Finding(
            code="evaluation_helped",
            severity="ok",
            params={**told, "loss": 1.203, "base_loss": 2.514, "difference": -1.311},
        ),
        Finding(code="evaluation_not_memorised", severity="ok", params={**told, "rows": 20, "share": 0.1}),
    )
    prompts = (
        *conversations()[:2],
        Conversation(id="general-zh-01", messages=(Message(role="user", content="天空为什么是蓝色的？"),)),
        Conversation(id="general-en-01", messages=(Message(role="user", content="Why is the sky blue?"),)),
        Conversation(
            id="trained-7",
            messages=(
                Message(role="user", content="Who are you?"),
                Message(role="assistant", content="Tess the tuner."),
            ),
        ),
    )
    texts = {"general-zh-01": "因为散射", "general-en-01": "It scatters.", "trained-7": "Tess  the tuner."}
    replies = tuple(
        Reply(
            prompt_id=prompt.id,
            variant=one,
            text="I do not know." if one == "base" else texts.get(prompt.id, "Finding: none."),
            tokens=12,
            stop_reason="length" if prompt.id == "general-zh-01" and one != "base" else "eos",
        )
        for prompt in prompts
        for one in ("base", *variants)
    )
    return Evaluation(
        run="security007",
        variants=tuple(
            VariantInfo(name=one, kind="base" if one == "base" else "adapter", path=f"/models/{one}")
            for one in ("base", *variants)
        ),
        rows=24,
        rows_from="held_out",
        answered=2,
        measures=measures,
        prompts=prompts,
        replies=replies,
        findings=findings,
        comparisons=len(variants),
        differences=8 * len(variants),
        settings=GenerationSettings(greedy=True, max_new_tokens=64),
        engine=Capabilities(kind="local", where="cpu", dtype="bfloat16"),
    )


@pytest.fixture
def evaluation() -> Evaluation:
    """See :func:`evaluation_of`."""
    return evaluation_of()
