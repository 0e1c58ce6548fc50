// Verify: whether what is shipped is what was tested, in one sentence first, then the evidence.
import { amend, currentLang, ended, figure, formatNumber, formatSeconds, go, html, startJob, t, useJob, useMemo, useRun, useState } from "../core.js";
import { Button, Card, Chart, Command, ErrorBox, Field, FindingText, Findings, Icon, Loading, PathInput, Rich, Select, Table, Verbatim, useKeys } from "../ui.js";
import { NoRun } from "./chat.js";
import { Running } from "./compare.js";
import { kindText } from "./exports.js";
import { GgufVerdict } from "./gguf.js";
import { inRoot, useJobsOf, useKept, useRunOf } from "./variants.js";

const LEVELS = ["structure", "assets", "weights", "behaviour"];
const CLASSES = ["exact", "faithful", "twice_rounded", "outside"];
const CODES = ["nearest", "twice_rounded", "saturated", "neighbour", "further"];
const TONES = { identical: "pass", equal_within_rounding: "pass", equal_within_quantization: "pass", different: "fail", not_verified: "skipped" };
const ICONS = { pass: "ok", warn: "warning", fail: "error", skipped: "info" };
const WORST = 8;

/** The page: what to hold against what, then the verdict. */
export default function Page({ query, session }) {
  const { run, base } = useRunOf(query, session);
  const { data, error } = useRun({ run, base });
  const mine = useJobsOf(run, session).filter((job) => job.kind === "verify" && (!query.merged || inRoot(job.params.directory, session?.root) === inRoot(query.merged, session?.root)));
  const id = query.job || mine[0]?.id;
  const job = useJob(id);
  if (!run) return html`<h1>${t("page.nav.verify")}</h1><${NoRun} />`;
  if (error && !data) return html`<h1>${t("page.nav.verify")}</h1><${ErrorBox} error=${error} />`;
  return html`<div class="verify-page">
    <h1>${t("page.nav.verify")}</h1>
    ${id && !job && html`<${Loading} />`}
    ${job && html`<${VerifyJob} job=${job} />`}
    ${!data ? html`<${Loading} text=${t("page.common.reading_run")} />` : (!job || ended(job)) && html`<${Form} run=${run} base=${base} data=${data} query=${query} again=${!!job} />`}
    ${!(job?.state === "done") && html`<${Reference} />`}
  </div>`;
}

function Form({ run, base, data, query, again }) {
  const merged = [...(data.merged || []), ...(data.gguf || []).map((one) => ({ ...one, kind: "gguf" }))];
  const models = (data.merged || []).filter((one) => one.kind === "model");
  const saved = data.inspection.run.checkpoints;
  const [own, setOwn] = useKept(`verify.${run}`, {});
  const form = {
    directory: merged[0]?.path || "", levels: LEVELS, model: "", ...own, ...(query.merged ? { directory: query.merged } : {}),
    checkpoint: (saved.find((one) => one.name === query.variant) || saved.at(-1))?.name || "final",
  };
  const set = (part) => setOwn((before) => ({ ...before, ...part }));
  const choose = (directory) => {
    set({ directory });
    if (query.merged) amend({ merged: null });
  };
  const [error, setError] = useState(null);
  const gguf = form.directory.trim().endsWith(".gguf");
  const model = form.model.trim() || models[0]?.path || "";
  const proveFile = () => startJob("verify_gguf", { directory: model, file: form.directory.trim(), base: base || null, levels: form.levels.length === LEVELS.length ? null : form.levels });
  const prove = () => gguf ? proveFile() :
    startJob("verify", { run, directory: form.directory.trim(), base: base || null, checkpoint: form.checkpoint, levels: form.levels.length === LEVELS.length ? null : form.levels, prompts_file: null });
  const start = () => prove().then((job) => { setError(null); amend({ job: job.id }); }, setError);
  const ready = form.directory.trim() && form.levels.length > 0 && (!gguf || model);
  useKeys({ run: ready ? start : null });
  const toggle = (name) => set({ levels: LEVELS.filter((level) => (level === name ? !form.levels.includes(name) : form.levels.includes(level))) });
  return html`<${Card} title=${t(again ? "page.verify.again" : "page.verify.form")}>
    <${Field} label=${t("page.verify.directory")} hint=${t("page.verify.directory_hint")}><${PathInput} pick="folder" testid="verify-directory" value=${form.directory} onchange=${choose} /><//>
    ${merged.length > 0 && html`<div class="chips" role="group" aria-label=${t("page.verify.found")}>
      ${merged.map((one) => html`<button type="button" class="chip" aria-pressed=${one.path === form.directory} onclick=${() => choose(one.path)}><${Verbatim}>${one.path}<//>${one.kind !== "model" && html` <span class="quiet">${kindText(one)}</span>`}</button>`)}</div>`}
    ${gguf
      ? html`<${Field} label=${t("page.verify.model")} hint=${t("page.verify.model_hint")}><${PathInput} pick="folder" testid="verify-model" value=${form.model} placeholder=${models[0]?.path ?? ""} onchange=${(next) => set({ model: next })} /><//>`
      : html`<${Field} label=${t("merge.adapter")}><${Select} testid="verify-checkpoint" value=${form.checkpoint} options=${saved.map((one) => ({ value: one.name, label: one.name }))} onchange=${(variant) => amend({ variant })} /><//>`}
    <fieldset class="levels-choice"><legend>${t("page.verify.levels")}</legend>
      ${LEVELS.map((name) => html`<label><input type="checkbox" checked=${form.levels.includes(name)} onchange=${() => toggle(name)} data-testid=${`level-${name}`} />
        <span><strong>${t(`level.${name}`)}</strong> <span class="quiet">${t(`level.${name}.proves`)}</span></span></label>`)}
    </fieldset>
    <${ErrorBox} error=${error} />
    <div class="start-row"><${Button} kind="primary" testid="verify-start" disabled=${!ready} onclick=${start}>${t("page.verify.start")}<//>
      ${!form.directory.trim() && html`<span class="quiet">${t("page.verify.nothing_merged")} <a href="#/merge" onclick=${(event) => { event.preventDefault(); go("merge", {}); }}>${t("page.nav.merge")}</a></span>`}</div>
  <//>`;
}

const Reference = () => html`<aside class="reference-note"><h2>${t("page.verify.reference")}</h2><p><${Rich} k="page.verify.reference.text" /></p></aside>`;

function VerifyJob({ job }) {
  if (job.lost) return html`<p class="quiet">${t("page.job.lost")}</p>`;
  if (job.state === "failed") return html`<${ErrorBox} error=${job.error} />`;
  if (job.state === "cancelled") return html`<p class="note" role="status">${t("page.verify.cancelled")}</p>`;
  if (!ended(job)) return html`<${Card} title=${t("page.verify.running")}><${Running} job=${job} testid="verify-progress" stopid="verify-cancel" /><${Command} text=${job.command} label=${t("page.common.command")} /><//>`;
  if (job.kind === "verify_gguf") return html`<${GgufVerdict} verdict=${job.result} /><${Command} text=${job.command} label=${t("page.common.command")} />`;
  return html`<${Verdict} job=${job} verdict=${job.result} charts=${job.result.charts || {}} />`;
}

/** The verdict of a finished job, and all that it stands on. */
export function Verdict({ job, verdict, charts }) {
  return html`
    <${Banner} job=${job} verdict=${verdict} />
    <ol class="tiles" aria-label=${t("page.verify.levels")}>${LEVELS.map((name) => html`<${Tile} key=${name} name=${name} level=${verdict.levels.find((one) => one.name === name)} />`)}</ol>
    <${Reference} />
    ${verdict.quantized?.length > 0 && html`<${Codes} quantized=${verdict.quantized} />`}
    ${verdict.tensors.length > 0 && html`<${Weights} verdict=${verdict} charts=${charts} />`}
    ${verdict.behaviour.length > 0 && html`<${Behaviour} verdict=${verdict} />`}
    <${Command} text=${job.command} label=${t("page.common.command")} />`;
}

function Banner({ job, verdict }) {
  const cause = verdict.answer === "different" ? verdict.causes[0] : null;
  const params = { merged: verdict.merged, base: verdict.base_model, checkpoint: verdict.checkpoint };
  const further = cause ? verdict.causes.slice(1) : verdict.causes;
  const tone = TONES[verdict.answer];
  return html`<section class=${`verdict tone-${tone}`} aria-live="polite">
    <p class="kicker">${t("verdict.question")}</p>
    <h2 data-testid="verify-verdict" data-answer=${verdict.answer}><${Icon} name=${ICONS[tone]} />${t(`verdict.${verdict.answer}`)}</h2>
    <p class="lead">${cause ? html`<${FindingText} finding=${cause} />` : html`<${Rich} k=${`verdict.${verdict.answer}.sentence`} params=${params} />`}</p>
    <p class="next"><${Rich} k=${`verdict.${verdict.answer}.next`} params=${{ command: job.command }} /></p>
    ${further.length > 0 && html`<p class="label">${t("verdict.further_causes")}</p><${Findings} findings=${further} />`}
    ${verdict.certificate && html`<${Findings} findings=${[verdict.certificate]} />`}
  </section>`;
}

function Tile({ name, level }) {
  const status = level?.status || "skipped";
  return html`<li class=${`tile tile-${status}`}>
    <p class="tile-name">${t(`level.${name}`)}</p>
    <p class=${`state state-${status}`}><${Icon} name=${ICONS[status]} />${t(`status.${status}`)}${status !== "skipped" && html` <span class="quiet">${formatSeconds(level.seconds)}</span>`}</p>
    <p class="tile-proves">${t(`level.${name}.proves`)}</p>
    <p class="tile-passes"><span class="label">${t("page.verify.passes")}</span> ${t(`page.verify.passes.${name}`)}</p>
    ${level?.findings.length > 0 && html`<${Findings} findings=${level.findings} />`}
  </li>`;
}

/** Every code of a quantized model by what explains it, and the layers that lost most. */
function Codes({ quantized }) {
  const [most, setMost] = useState(WORST);
  const sum = (name) => quantized.reduce((all, one) => all + one[name], 0);
  const elements = sum("elements");
  const worst = [...quantized].sort((a, b) => (b.relative_error ?? 0) - (a.relative_error ?? 0));
  return html`<section class="weights" data-testid="verify-codes"><h2>${t("verify.codes")}</h2>
    <p class="intro">${t("verify.codes_summary", { scheme: [...new Set(quantized.map((one) => one.scheme))].join(", "), tensors: quantized.length, elements })}</p>
    <${Table} label=${t("verify.codes")} rows=${CODES.map((name) => ({ key: name, name, count: sum(name) }))} columns=${[
      { key: "class", title: t("verify.class"), kind: "nowrap", render: ({ name }) => t(`verify.codes.${name}`) },
      { key: "count", title: t("verify.count"), numeric: true, render: ({ count }) => formatNumber(count) },
      { key: "share", title: t("verify.share"), numeric: true, render: ({ count }) => share(count, elements) },
      { key: "meaning", title: t("verify.meaning"), render: ({ name }) => t(`verify.codes.${name}.what`) },
    ]} />
    <h3>${t("verify.codes.worst")}</h3>
    <${Table} label=${t("verify.codes.worst")} rows=${worst.slice(0, most).map((one) => ({ key: one.name, ...one }))} columns=${[
      { key: "name", title: t("verify.tensor"), kind: "tensor-name", render: (one) => html`<${Verbatim}>${one.name}<//>` },
      { key: "elements", title: t("verify.count"), numeric: true, render: (one) => formatNumber(one.elements) },
      { key: "relative_error", title: t("merge.relative_error"), numeric: true, render: (one) => figure(one.relative_error) },
      { key: "gain", title: "gain", numeric: true, render: (one) => (one.gain === null ? "–" : `${figure(one.gain)} ± ${figure(one.gain_error)}`) },
    ]} />
    ${worst.length > most && html`<${Button} onclick=${() => setMost(most + 50)}>${t("verify.more_tensors", { count: worst.length - most })}<//>`}
  </section>`;
}

/** A heatmap whose fields say their numbers in words and in three digits. */
function named(spec) {
  if (!spec) return null;
  const titles = { module: t("adapter.kind"), layer: t("chart.heatmap.layer"), value: t("chart.heatmap.error") };
  const told = (one) => ({ ...one, title: titles[one.field] ?? one.field, ...(one.field === "value" ? { format: ".3~g" } : {}) });
  const layer = (one) => (one.encoding?.tooltip ? { ...one, encoding: { ...one.encoding, tooltip: one.encoding.tooltip.map(told) } } : one);
  return { ...spec, layer: spec.layer.map(layer) };
}

function Weights({ verdict, charts }) {
  const [chosen, setChosen] = useState(null);
  const [most, setMost] = useState(WORST);
  const sum = (name) => verdict.tensors.reduce((all, one) => all + one[name], 0);
  const elements = sum("elements");
  const heatmap = useMemo(() => named(charts.heatmap?.[currentLang()]), [charts, currentLang()]);
  const size = (one) => (Number.isFinite(one.relative_error) ? one.relative_error : 0);
  const listed = verdict.tensors.filter((one) => !chosen || within(one, chosen)).sort((a, b) => b.outside - a.outside || size(b) - size(a));
  return html`<section class="weights"><h2>${t("verify.tensors")}</h2>
    <p class="intro">${t("verify.tensors_summary", { tensors: verdict.tensors.length, elements })}</p>
    <${Table} label=${t("verify.tensors")} rows=${CLASSES.map((name) => ({ key: name, name, count: sum(name) }))} rowClass=${({ name, count }) => (name === "outside" && count ? "bad" : "")} columns=${[
      { key: "class", title: t("verify.class"), kind: "nowrap", render: ({ name }) => t(`verify.${name}`) },
      { key: "count", title: t("verify.count"), numeric: true, render: ({ count }) => formatNumber(count) },
      { key: "share", title: t("verify.share"), numeric: true, render: ({ count }) => share(count, elements) },
      { key: "meaning", title: t("verify.meaning"), render: ({ name }) => t(`verify.${name}.what`) },
    ]} />
    ${heatmap && html`<h3>${t("section.heatmap_error")}</h3>
      <${Chart} spec=${heatmap} testid="verify-heatmap" label=${t("section.heatmap_error")} onclick=${({ layer, module }) => module && setChosen({ layer, module })} />
      <p class="note">${t("chart.heatmap.error_caption")} ${t("page.verify.click")}</p>`}
    <h3>${t("verify.worst")}${chosen && html` <button type="button" class="chip" onclick=${() => setChosen(null)}><${Verbatim}>${chosen.layer} ${chosen.module}<//> ×</button>`}</h3>
    <${Table} label=${t("verify.worst")} rows=${listed.slice(0, most).map((one) => ({ key: one.name, ...one }))} rowClass=${(one) => (one.outside ? "bad" : "")} columns=${TENSOR_COLUMNS()} />
    ${listed.length > most && html`<${Button} onclick=${() => setMost(most + 50)}>${t("verify.more_tensors", { count: listed.length - most })}<//>`}
  </section>`;
}

const TENSOR_COLUMNS = () => [
  { key: "name", title: t("verify.tensor"), kind: "tensor-name", render: (one) => html`<${Verbatim}>${one.name}<//>` },
  { key: "elements", title: t("verify.count"), numeric: true, render: (one) => formatNumber(one.elements) },
  ...CLASSES.map((name) => ({
    key: name, title: t(`verify.${name}`), numeric: true, render: (one) => (name === "outside" ? formatNumber(one.outside) : share(one[name], one.elements)),
  })),
  { key: "gain", title: "gain", numeric: true, render: (one) => figure(one.gain) },
  { key: "relative_error", title: t("merge.relative_error"), numeric: true, render: (one) => figure(one.relative_error) },
];

/** A share as the report shows it: 0 % and 100 % only where it is exactly that. */
function share(part, of) {
  const value = part / (of || 1);
  if (value === 0 || value === 1) return `${100 * value}%`;
  if (value < 0.0001) return "< 0.01%";
  if (value > 0.9999) return "> 99.99%";
  return `${(100 * value).toFixed(value < 0.01 || value > 0.99 ? 2 : 1)}%`;
}

/** Whether a tensor belongs to a field of the heatmap: a layer and a module. */
const within = (tensor, { layer, module }) => {
  const parts = tensor.name.split(".");
  return parts.includes(String(layer)) && parts.includes(module.split(".").at(-1));
};

const isTie = (row) => Boolean(row.divergence?.tie);
const partingOf = (row) =>
  row.same_text ? t("verify.text_same") : t(isTie(row) ? "verify.text_tie" : "verify.text_differs", { place: row.first_difference === null ? null : row.first_difference + 1 });

function Behaviour({ verdict }) {
  const rows = [...verdict.behaviour].sort((a, b) => a.same_text - b.same_text || isTie(a) - isTie(b) || a.top1_agreement - b.top1_agreement || b.mean_kl - a.mean_kl);
  const parted = rows.filter((row) => !row.same_text);
  const number = (key, name, render) => ({ key, title: t(`verify.${name}`), numeric: true, render });
  const columns = [
    { key: "question", title: t("verify.prompt"), render: (row) => html`<div class="model-text clip" dir="auto">${row.question}</div>` },
    number("tokens", "positions"),
    number("mean_kl", "mean_kl", (row) => figure(row.mean_kl)),
    ...(rows.some((row) => row.rounding_kl !== null) ? [number("rounding_kl", "rounding_kl", (row) => figure(row.rounding_kl))] : []),
    number("base_kl", "base_kl", (row) => figure(row.base_kl)),
    number("top1", "top1", (row) => share(row.top1_agreement, 1)),
    number("logit", "logit", (row) => figure(row.max_logit_difference)),
    { key: "text", title: t("verify.text"), kind: "texts", render: partingOf },
  ];
  return html`<section class="behaviour"><h2>${t("verify.behaviour")}</h2>
    <p class="intro">${t("verify.behaviour_summary", { dtype: verdict.dtype })}</p>
    <${Table} label=${t("verify.behaviour")} rows=${rows.map((row) => ({ key: row.prompt_id, ...row }))} rowClass=${(row) => (!row.same_text && !isTie(row) ? "differs" : "")} columns=${columns} />
    ${parted.length > 0 && html`<details open=${!isTie(parted[0])}><summary>${t("verify.texts", { count: parted.length })}</summary>${parted.map((row) => html`<${Parted} key=${row.prompt_id} row=${row} />`)}</details>`}
  </section>`;
}

/** Two greedy texts up to where they part, and what both models thought there. */
function Parted({ row }) {
  let same = 0;
  while (same < row.adapter_text.length && row.adapter_text[same] === row.merged_text[same]) same += 1;
  if (/[\uD800-\uDBFF]/.test(row.adapter_text[same - 1] || "")) same -= 1;
  const parted = row.divergence;
  const text = (whole, Mark) => html`<div class="model-text" dir="auto" translate="no">${whole.slice(0, same)}<${Mark}>${whole.slice(same)}<//></div>`;
  return html`<article class="exchange is-open"><header><span class="id"><${Verbatim}>${row.prompt_id}<//></span><h3 class="model-text" dir="auto">${row.question}</h3></header>
    <div class="cells cells-2">
      <section class="cell"><p class="who">${t("verify.text_adapter")}</p>${text(row.adapter_text, "del")}</section>
      <section class="cell"><p class="who">${t("verify.text_merged")}</p>${text(row.merged_text, "ins")}</section>
    </div>
    ${parted && html`<${Table} rows=${[["verify.text_adapter", parted.adapter_probabilities], ["verify.text_merged", parted.merged_probabilities]].map(([who, both]) => ({ key: who, who, both }))} columns=${[
        { key: "who", title: t("verify.candidate", { place: row.first_difference + 1 }), render: ({ who }) => t(who) },
        ...[parted.adapter_choice, parted.merged_choice].map((token, place) => ({ key: place, title: html`<code>${token.replaceAll("\n", "⏎")}</code>`, numeric: true, render: ({ both }) => share(both[place], 1) })),
      ]} />
      <p class="note">${t(`verify.divergence.${parted.tie ? "tie" : "flip"}`, { margin: parted.margin, noise: parted.noise })}</p>`}
  </article>`;
}
