// One run on one page: what it is, whether it worked, what can be done next; then the evidence.
import {
  ended, figure, fill, formatBytes, formatNumber, hasText, html, link, startJob, t, useEffect, useJob, useJobs, useMemo, useRef, useRun, useState,
} from "../core.js";
import { Button, Card, Chart, Command, Empty, ErrorBox, Facts, FindingText, Findings, Icon, JobCard, Loading, Rich, Slider, Table, Toggle, Verbatim, confirmDialog } from "../ui.js";

const named = (path) => (path ?? "").replace(/\/+$/, "").split("/").pop() || path;
const finite = (rows, key) => rows.filter((row) => Number.isFinite(row[key]));
const settingOf = (run, name) => run.settings.find((setting) => setting.name === name)?.value;
const lastStep = (run) => Math.max(0, ...run.log.map((row) => row.step), ...run.checkpoints.map((saved) => saved.step ?? 0));

// --- What is this run, did it work, what next ----------------------------------------------------------------------

function health(inspection) {
  const grave = inspection.health.some((finding) => finding.severity === "error");
  const look = inspection.health.some((finding) => finding.severity === "warning");
  return grave ? { tone: "error", key: "health.ill" } : look ? { tone: "warning", key: "health.look" } : { tone: "ok", key: "health.well" };
}

function whatItIs(run, adapter) {
  const rows = settingOf(run, "dataset_rows") ?? settingOf(run, "train_rows");
  const epochs = Math.max(0, ...finite(run.log, "epoch").map((row) => row.epoch));
  const parts = [
    adapter ? t("page.overview.is.adapter", { method: adapter.peft_type === "LORA" ? "LoRA" : adapter.peft_type, r: adapter.r, alpha: adapter.lora_alpha }) : t("page.overview.is.unknown"),
    t(`writer.${run.writer}`),
    lastStep(run) > 0 && t("page.overview.is.steps", { steps: lastStep(run) }),
    epochs > 0 && t("page.overview.is.epochs", { epochs }),
    rows && t("page.overview.is.rows", { rows: Number(rows) }),
  ];
  return parts.filter(Boolean).join(" · ");
}

function howItWent(run) {
  const held = finite(run.log, "eval_loss");
  const train = finite(run.log, "loss");
  if (held.length > 1) {
    const best = held.reduce((least, row) => (row.eval_loss < least.eval_loss ? row : least));
    const [first, last] = [held[0], held.at(-1)];
    const key = last.eval_loss > 1.02 * best.eval_loss ? "rose" : last.eval_loss < first.eval_loss ? "fell" : "stayed";
    return { key: `page.overview.went.${key}`, params: { first: first.eval_loss, last: last.eval_loss, best: best.eval_loss, step: best.step, name: nearest(run, best.step) } };
  }
  if (held.length) return { key: "page.overview.went.once", params: { last: held[0].eval_loss } };
  if (train.length > 1) return { key: "page.overview.went.train", params: { first: train[0].loss, last: train.at(-1).loss } };
  return { key: "page.overview.went.unknown", params: {} };
}

const nearest = (run, step) => run.checkpoints.find((saved) => saved.step === step)?.name ?? `${step}`;

// Down to the table, and the focus with it; the address stays.
function toCheckpoints(event) {
  event.preventDefault();
  const table = document.getElementById("checkpoints");
  table?.scrollIntoView();
  table?.querySelector("[tabindex], button")?.focus({ preventScroll: true });
}

function First({ data, query }) {
  const { run, adapter } = data.inspection;
  const state = health(data.inspection);
  const went = howItWent(run);
  const many = run.checkpoints.length > 1;
  return html`<section class=${`callout tone-${state.tone}`} data-testid="overview-summary">
    <h2><${Icon} name=${state.tone} />${t(state.key)}</h2>
    <p class="lead"><${Rich} k=${went.key} params=${went.params} /></p>
    ${data.inspection.health.length ? html`<${Findings} findings=${data.inspection.health} testid="findings" />` : html`<p class="quiet">${t("health.nothing")}</p>`}
    ${adapter?.refusal && html`<p class="field-error">${t("run.refusal")}: ${adapter.refusal}</p>`}
    ${!adapter && html`<div class="next-steps"><p class="quiet">${t("page.overview.next.mend")}</p><div class="actions">${many && html`<${Button} onclick=${toCheckpoints}>${t("page.overview.next.choose")}<//>`}<${Button} href=${link("open")}>${t("page.overview.next.other")}<//></div></div>`}
    ${adapter && html`<div class="next-steps">
      <p class="quiet">${t("page.overview.next")}</p>
      <div class="actions">
        <${Button} kind="primary" href=${link("compare", { variant: query.variant })} testid="next-compare">${t("page.overview.next.compare")}<//>
        <${Button} href=${link("chat", { variant: query.variant ?? data.inspection.checkpoint })} testid="next-chat">${t("page.overview.next.chat")}<//>
        ${many && html`<${Button} onclick=${toCheckpoints}>${t("page.overview.next.choose")}<//>`}
        <${Button} href=${link("merge", { variant: query.variant })} testid="next-merge">${t("page.overview.next.merge")}<//>
      </div>
    </div>`}
  </section>`;
}

const Merged = ({ merged = [], gguf = [] }) =>
  merged.length + gguf.length > 0 &&
  html`<${Card} title=${t("page.overview.merged")}><ul class="plain-list">${merged.map((one) => html`<li key=${one.path}><${Verbatim}>${one.path}<//> ${one.kind === "quantized" && html`<span class="quiet">${t("page.export.kind.quantized")} ${one.scheme}</span> `}${one.certificate ? html`<span class="tag">${hasText(`verdict.${one.certificate}`) ? t(`verdict.${one.certificate}`) : one.certificate}</span>` : html`<span class="quiet">${t("verdict.not_verified")}</span>`} <a href=${link("verify", { merged: one.path })}>${t("page.overview.verify")}</a></li>`)}
    ${gguf.map((one) => html`<li key=${one.path}><${Verbatim}>${one.path}<//> <span class="quiet">GGUF · ${formatBytes(one.size_bytes)}</span> <a href=${link("verify", { merged: one.path })}>${t("page.overview.verify")}</a></li>`)}</ul><//>`;

// --- The loss ------------------------------------------------------------------------------------------------------

// Source: LLaMA-Factory, src/llamafactory/extras/ploting.py, smooth.
const houseWeight = (count) => 1.8 * (1 / (1 + Math.exp(-0.05 * count)) - 0.5);

export function smoothed(values, weight) {
  let last = values[0];
  return values.map((value) => (last = last * weight + (1 - weight) * value));
}

const layerOf = (spec, name) => spec.layer?.find((layer) => layer.encoding?.color?.datum === t(`chart.loss.${name}`));

function shapedLoss(spec, { weight, log, marks }) {
  const shaped = structuredClone(spec);
  const raw = layerOf(shaped, "train")?.data.values ?? [];
  const smooth = layerOf(shaped, "smoothed");
  if (smooth && raw.length) smooth.data.values = smoothed(raw.map((point) => point.loss), weight).map((loss, place) => ({ step: raw[place].step, loss }));
  if (!marks) shaped.layer = shaped.layer.filter((layer) => layer !== layerOf(shaped, "checkpoint"));
  for (const layer of shaped.layer) {
    if (layer.encoding.y?.field !== "loss") continue;
    layer.encoding.tooltip = [{ field: "step", title: t("chart.step") }, { field: "loss", title: t("page.overview.loss"), format: ".4f" }];
    if (layer.mark.type === "line" && !layer.mark.point) layer.mark.point = { size: 60, opacity: 0, filled: true };
    if (!log) continue;
    layer.data.values = layer.data.values.filter((point) => point.loss > 0);
    layer.encoding.y.scale = { type: "log", nice: false };
    layer.encoding.y.axis = { tickCount: 5, format: ".2~g" };
  }
  return shaped;
}

function rateSpec(run, spec) {
  const values = finite(run.log, "learning_rate").map((row) => ({ step: row.step, rate: row.learning_rate }));
  if (values.length < 2) return null;
  const x = { field: "step", type: "quantitative", title: t("chart.step"), axis: { tickMinStep: 1, tickCount: 10, grid: false } };
  const y = { field: "rate", type: "quantitative", title: t("param.learning_rate"), axis: { format: ".1e", tickCount: 3 } };
  return { ...spec, layer: undefined, height: 90, data: { values }, mark: { type: "line", strokeWidth: 2, color: "#8b949e" }, encoding: { x, y } };
}

function Loss({ spec, run }) {
  const rows = finite(run.log, "loss").length;
  const usual = Math.round(100 * houseWeight(rows)) / 100;
  const [weight, setWeight] = useState(usual);
  const [log, setLog] = useState(false);
  const [marks, setMarks] = useState(true);
  const [rate, setRate] = useState(false);
  const shaped = useMemo(() => spec && shapedLoss(spec, { weight, log, marks }), [spec, weight, log, marks]);
  const second = useMemo(() => spec && rateSpec(run, spec), [spec, run]);
  if (!spec) return html`<${Card} title=${t("section.loss")}><${Empty} title=${t("chart.loss.missing")} /><//>`;
  return html`<${Card} title=${t("section.loss")}>
    <div class="toolbar">
      <label>${t("page.overview.smoothing")} <${Slider} value=${weight} onchange=${setWeight} max=${0.99} testid="loss-smoothing" label=${t("page.overview.smoothing")} format=${(value) => value.toFixed(2)} /></label>
      <${Toggle} value=${log} onchange=${setLog} testid="loss-log" label=${t("page.overview.log_scale")} />
      ${layerOf(spec, "checkpoint") && html`<${Toggle} value=${marks} onchange=${setMarks} label=${t("page.overview.marks")} />`}
      ${second && html`<${Toggle} value=${rate} onchange=${setRate} testid="loss-rate" label=${t("param.learning_rate")} />`}
    </div>
    <${Chart} spec=${shaped} testid="loss-chart" label=${t("section.loss")} />
    ${rate && second && html`<${Chart} spec=${second} testid="rate-chart" label=${t("param.learning_rate")} />`}
    <p class="note">${t(weight === usual ? "chart.loss.caption" : "page.overview.loss.caption")}</p>
  <//>`;
}

// --- Checkpoints ---------------------------------------------------------------------------------------------------

const estimate = (one) => (one == null ? "–" : one.low == null ? figure3(one.value) : `${figure3(one.value)} ± ${figure3((one.high - one.low) / 2)}`);
const figure3 = (value) => (Number.isFinite(value) ? value.toFixed(3).replace("-", "−") : "–");

function acts(name) {
  return html`<div class="actions">
    <${Button} href=${link("chat", { variant: name })} label=${t("page.overview.chat_with", { name })}>${t("page.overview.chat")}<//>
    <${Button} href=${link("compare", { variant: name })} label=${t("page.overview.compare_with", { name })}>${t("page.overview.compare")}<//>
    <${Button} href=${link("merge", { variant: name })} label=${t("page.overview.export_of", { name })}>${t("page.overview.export")}<//>
  </div>`;
}

function Checkpoints({ run, query, session }) {
  const [error, setError] = useState(null);
  const jobs = useJobs();
  const mine = jobs.find((job) => job.kind === "checkpoints" && samePlace(job.params?.run, query.run, run));
  const job = useJob(mine?.id ?? null);
  const choice = job?.state === "done" ? job.result : null;
  const chosen = new Map((choice?.candidates ?? []).map((one) => [one.name, one]));
  const start = () => startJob("checkpoints", { run: query.run, base: query.base ?? null }).then(() => setError(null), setError);
  const columns = [
    { key: "name", title: t("checkpoint.name"), kind: "nowrap", render: (saved) => html`<${Verbatim}>${saved.name}<//> ${saved.is_best && html` <span class="tag">${t("checkpoint.best")}</span>`}${choice?.recommended === saved.name && html` <span class="tag tag-good">${t("choice.recommended")}</span>`}${saved.name === "final" && html` <span class="quiet">${t("checkpoint.final")}</span>`}` },
    { key: "step", title: t("checkpoint.step"), numeric: true, render: (saved) => formatNumber(saved.step) },
    { key: "loss", title: t("checkpoint.loss"), numeric: true, render: (saved) => figure3(saved.loss) },
    { key: "eval_loss", title: t("checkpoint.eval_loss"), numeric: true, render: (saved) => (chosen.get(saved.name)?.loss ? estimate(chosen.get(saved.name).loss) : figure3(saved.eval_loss)) },
    choice && { key: "to_best", title: t("choice.to_best"), numeric: true, render: (saved) => estimate(chosen.get(saved.name)?.to_best) },
    choice && { key: "to_base", title: t("choice.to_base"), numeric: true, render: (saved) => estimate(chosen.get(saved.name)?.to_base) },
    { key: "acts", title: html`<span class="unseen">${t("page.overview.acts")}</span>`, kind: "full", render: (saved) => acts(saved.name) },
  ].filter(Boolean);
  const rows = run.checkpoints.map((saved) => ({ ...saved, key: saved.name }));
  const choose = run.checkpoints.length > 1 && html`<${Button} onclick=${start} disabled=${job && !ended(job)} testid="choose-checkpoint">${t("page.overview.choose")}<//>`;
  return html`<div id="checkpoints"><${Card} title=${t("section.checkpoints")} actions=${choose} kind="stack">
    ${rows.length ? html`<${Table} columns=${columns} rows=${rows} testid="checkpoint-table" label=${t("section.checkpoints")} />` : html`<${Empty} title=${t("hint.checkpoints")} />`}
    <${ErrorBox} error=${error} />
    ${choice && html`<p><${FindingText} finding=${choice.reason} /></p><${Findings} findings=${choice.findings} />`}
    ${job && !choice && html`<${JobCard} job=${job} />`}
    ${!choice && rows.some((saved) => saved.is_best) && html`<p class="note">${t("checkpoint.note_best")}</p>`}
    ${choice?.rows > 0 && html`<p class="note">${t("choice.note")}</p>`}
  <//></div>`;
}

// A job's run may be named relative to the root, or by its whole path.
const samePlace = (named_, asked, run) => Boolean(named_) && (named_ === asked || named_ === run.path || run.path.endsWith(`/${named_}`));

// --- What was trained ----------------------------------------------------------------------------------------------

const aboutOf = (key) => (hasText(`page.overview.about.${key}`) ? t(`page.overview.about.${key}`) : null);
const fact = (key, value) => ({ key, label: t(`fact.${key}`), value, about: aboutOf(key) });
const COUNTS = new Set(["dataset_rows", "train_rows", "held_out_rows", "supervised_tokens", "rows_cut", "rows_dropped"]);
const plain = (value) => (value === null || value === undefined ? "–" : typeof value === "number" && !Number.isInteger(value) ? fill("{v:.6g}", { v: value }) : String(value));

function settingFact(setting) {
  const label = hasText(`param.${setting.name}`) ? t(`param.${setting.name}`) : html`<${Verbatim}>${setting.name}<//>`;
  const others = setting.overruled.map((other) => html`<span class="about"><${Rich} k="run.overruled" params=${{ source: other.source, value: plain(other.value) }} /></span>`);
  return { key: setting.name, label, value: html`<${Verbatim}>${COUNTS.has(setting.name) ? formatNumber(setting.value) : plain(setting.value)}<//>${others}`, about: aboutOf(setting.name) };
}

function adapterFacts(adapter) {
  if (!adapter) return [];
  const scaling = adapter.scaling == null ? "–" : t(adapter.use_rslora ? "fact.scaling_rslora" : "fact.scaling_plain", { scaling: adapter.scaling });
  return [
    fact("method", adapter.peft_type),
    fact("r", plain(adapter.r)),
    fact("alpha", plain(adapter.lora_alpha)),
    fact("scaling", scaling),
    fact("targets", html`<${Verbatim}>${adapter.target_modules.join(", ")}<//> <span class="quiet">${t("fact.modules", { count: adapter.modules.length })}</span>`),
    fact("parameters", formatNumber(adapter.parameters)),
    fact("dtype", adapter.dtype),
    fact("size", formatBytes(adapter.size_bytes)),
    adapter.relative_update != null && fact("relative_update", fill("{v:.2%}", { v: adapter.relative_update })),
  ].filter(Boolean);
}

function forecastFact(forecast) {
  if (!forecast) return [];
  const kind = forecast.rounding === "nearest" ? "nearest" : "faithful";
  const params = { dtype: forecast.dtype, nearest: forecast.nearest.gain, kept: forecast.kept.gain };
  return [fact("forecast", html`<${Rich} k=${`fact.forecast.${kind}`} params=${params} />`)];
}

// Which of the known settings belong together, in the order in which they are read.
const SETTINGS = {
  data: ["dataset", "dataset_rows", "train_rows", "held_out_rows", "template", "cutoff_len", "max_length", "supervised_tokens", "rows_cut", "rows_dropped"],
  learning: [
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "weight_decay", "max_grad_norm", "lora_dropout", "seed",
  ],
  machine: ["compute_dtype", "device", "bf16", "quantization_bit"],
};

function settingGroups(run) {
  const known = new Map(run.settings.filter((setting) => hasText(`param.${setting.name}`) && setting.value !== null).map((setting) => [setting.name, setting]));
  return Object.entries(SETTINGS).map(([group, names]) => [`page.overview.group.${group}`, names.filter((name) => known.has(name)).map((name) => settingFact(known.get(name)))]);
}

function Trained({ inspection }) {
  const { run, adapter, forecast } = inspection;
  const model = [
    fact("base_model", html`<${Verbatim}>${run.base_model ?? "–"}<//>`),
    fact("directory", html`<${Verbatim}>${run.path}<//>`),
    fact("kind", t(`kind.${run.kind}`)),
    fact("writer", t(`writer.${run.writer}`)),
  ];
  const groups = [["run.model", model], ["run.adapter", [...adapterFacts(adapter), ...forecastFact(forecast)]], ...settingGroups(run)].filter(([, facts]) => facts.length);
  const metrics = Object.entries(run.metrics);
  return html`<${Card} title=${t("section.run")}>
    <div class="groups">${groups.map(([title, facts]) => html`<section key=${title}><h3>${t(title)}</h3><${Facts} facts=${facts} /></section>`)}</div>
    ${metrics.length > 0 && html`<details><summary>${t("run.metrics")}</summary><${Facts} facts=${metrics.map(([name, value]) => ({ label: html`<${Verbatim}>${name}<//>`, value: figure(value) }))} /></details>`}
    ${run.settings.length > 0 && html`<details data-testid="settings"><summary>${t("run.settings", { count: run.settings.length })}</summary><${Facts} facts=${run.settings.map((setting) => ({ ...settingFact(setting), label: html`<${Verbatim}>${setting.name}<//>`, about: null }))} /></details>`}
  <//>`;
}

// --- Files ---------------------------------------------------------------------------------------------------------

const NEEDS = ["inference", "resuming", "record", "unknown"];
const MOST_FILES = 100;
const MOST_FOLDERS = 100;

function NeedsBar({ files }) {
  const box = useRef(null);
  const sizes = NEEDS.map((need) => files.filter((file) => file.needed_for === need)).map((of, place) => ({ need: NEEDS[place], count: of.length, size: of.reduce((sum, file) => sum + file.size_bytes, 0) })).filter((of) => of.count);
  const total = sizes.reduce((sum, of) => sum + of.size, 0) || 1;
  useEffect(() => {
    sizes.forEach((of, place) => box.current.children[place].style.setProperty("flex-grow", String(Math.max(of.size / total, 0.004))));
  });
  return html`<div class="needs" aria-hidden="true" ref=${box}>${sizes.map((of) => html`<span key=${of.need} class=${`need-${of.need}`}></span>`)}</div>
    <ul class="needs-legend">${sizes.map((of) => html`<li key=${of.need}><span class=${`swatch need-${of.need}`}></span>${t(`needed.${of.need}`)} <span class="quiet">${t("files.group", { count: of.count, size: of.size })}</span></li>`)}</ul>`;
}

const folderOf = (path) => (path.includes("/") ? path.slice(0, path.lastIndexOf("/")) : "");
const inOrder = (one, other) => {
  const [a, b] = [folderOf(one.path), folderOf(other.path)];
  if (a !== b) return !a ? -1 : !b ? 1 : a.localeCompare(b, "en", { numeric: true });
  return NEEDS.indexOf(one.needed_for) - NEEDS.indexOf(other.needed_for) || one.path.localeCompare(other.path);
};

function folders(files) {
  const found = new Map();
  for (const file of files) found.set(folderOf(file.path), [...(found.get(folderOf(file.path)) ?? []), file]);
  return [...found];
}

function FolderHead({ folder, files, open, toggle }) {
  const size = files.reduce((sum, file) => sum + file.size_bytes, 0);
  const told = html`<span class="quiet">${t("files.group", { count: files.length, size })}</span>`;
  return html`<tr class="folder-row"><th scope="rowgroup" colspan="4">${folder
    ? html`<button type="button" aria-expanded=${open} onclick=${toggle}><${Icon} name="next" /><${Verbatim}>${folder}/<//> ${told}</button>`
    : html`<span>${t("files.root")} ${told}</span>`}</th></tr>`;
}

function FileRow({ file, mayGo }) {
  return html`<tr data-needed=${file.needed_for}>
    <th scope="row" class="file-name"><${Verbatim} title=${file.path}>${named(file.path)}<//></th>
    <td class="numeric">${formatBytes(file.size_bytes)}</td>
    <td class="full needed"><span class="nowrap"><span class=${`swatch need-${file.needed_for}`}></span>${t(`needed.${file.needed_for}`)}</span>${mayGo && html` <span class="tag">${t("page.overview.may_go")}</span>`}</td>
    <td class="what">${hasText(`file.${file.kind}`) ? t(`file.${file.kind}`) : file.kind}</td>
  </tr>`;
}

// The root's own files are shown at once; checkpoints hold nearly the same again, so their folders are opened by hand.
function Files({ run, cleanup }) {
  const [open, setOpen] = useState(() => new Set([""]));
  const [all, setAll] = useState(false);
  const removable = new Set((cleanup?.files ?? []).map((file) => file.path));
  const grouped = useMemo(() => folders([...run.files].sort(inOrder)), [run]);
  const size = run.files.reduce((sum, file) => sum + file.size_bytes, 0);
  const toggle = (folder) => setOpen((before) => new Set(before.has(folder) ? [...before].filter((one) => one !== folder) : [...before, folder]));
  const shown = all ? grouped : grouped.slice(0, MOST_FOLDERS);
  const first = (files) => (all ? files : files.slice(0, MOST_FILES));
  const left = grouped.length > shown.length || grouped.some(([folder, files]) => open.has(folder) && files.length > MOST_FILES);
  return html`<${Card} title=${t("section.files")}>
    <p class="quiet">${t("files.summary", { count: run.files.length, size })}</p>
    <${NeedsBar} files=${run.files} />
    <div class="scroll stack" tabindex="0" role="region" aria-label=${t("section.files")}><table data-testid="file-table">
      <thead><tr><th scope="col">${t("files.name")}</th><th scope="col" class="numeric">${t("files.size")}</th><th scope="col">${t("files.needed")}</th><th scope="col">${t("files.what")}</th></tr></thead>
      <tbody>${shown.map(([folder, files]) => html`<${FolderHead} key=${`${folder}/`} folder=${folder} files=${files} open=${open.has(folder)} toggle=${() => toggle(folder)} />${open.has(folder) && first(files).map((file) => html`<${FileRow} key=${file.path} file=${file} mayGo=${removable.has(file.path)} />`)}`)}</tbody>
    </table></div>
    ${left && !all && html`<div class="actions"><${Button} onclick=${() => setAll(true)}>${t("page.overview.more_files")}<//></div>`}
  <//>`;
}

function CleanUp({ cleanup, run, query, reload }) {
  const [error, setError] = useState(null);
  const jobs = useJobs();
  const mine = jobs.find((job) => job.kind === "cleanup" && job.params?.apply && samePlace(job.params.run, query.run, run));
  const job = useJob(mine?.id ?? null);
  const done = job?.state === "done" ? job.result : null;
  const count = cleanup?.files.length ?? 0;
  const said = t("cleanup.summary", { count, size: cleanup?.frees_bytes });
  const ask = async () => {
    const sure = await confirmDialog({ title: t("page.overview.cleanup.ask"), text: said, danger: true, confirm: t("page.overview.cleanup.confirm"), children: html`<ul class="file-list">${cleanup.files.map((file) => html`<li><${Verbatim}>${file.path}<//> <span class="quiet">${formatBytes(file.size_bytes)}</span></li>`)}</ul>` });
    if (sure) startJob("cleanup", { run: query.run, apply: true }).then(() => setError(null), setError);
  };
  useEffect(() => {
    if (done) reload();
  }, [Boolean(done)]);
  if (!cleanup) return null;
  return html`<${Card} title=${t("page.overview.cleanup")} testid="cleanup" actions=${count > 0 && html`<${Button} kind="danger" onclick=${ask} disabled=${job && !ended(job)} testid="cleanup-start">${t("page.overview.cleanup.delete")}<//>`}>
    <p>${count ? said : t("cleanup.nothing")}</p>
    <${ErrorBox} error=${error ?? job?.error} />
    ${done && html`<p class="job-state job-done"><${Icon} name="ok" />${t("cleanup.done", { count: done.removed?.length, size: done.freed_bytes })}</p>
      ${done.errors?.length > 0 && html`<ul class="error-details">${done.errors.map((failed) => html`<li><${Verbatim}>${failed.path}<//>: ${t(`cleanup.failed.${failed.reason}`)}</li>`)}</ul>`}`}
    ${cleanup.kept.length > 0 && html`<details><summary>${t("page.overview.cleanup.kept")}</summary><ul class="plain-list">${cleanup.kept.map((kept) => html`<li><${Rich} k=${`cleanup.kept.${kept.reason}`} params=${kept} /></li>`)}</ul></details>`}
  <//>`;
}

// --- The page ------------------------------------------------------------------------------------------------------

export default function Page({ query, session }) {
  const { data, error, loading, reload } = useRun({ run: query.run, base: query.base, checkpoint: null });
  if (!query.run) return html`<h1>${t("page.nav.overview")}</h1><${Empty} title=${t("page.common.no_run")} hint=${t("page.common.no_run.hint")} action=${html`<${Button} kind="primary" href=${link("open")}>${t("page.common.open_run")}<//>`} />`;
  if (error) return html`<h1><${Verbatim}>${named(query.run)}<//></h1><${ErrorBox} error=${error} retry=${reload} /><div class="actions"><${Button} href=${link("open")}>${t("page.common.open_run")}<//></div>`;
  if (!data) return html`<h1><${Verbatim}>${named(query.run)}<//></h1><${Loading} text=${t("page.overview.reading")} />`;
  const { run, adapter } = data.inspection;
  return html`
    <div class="page-head"><div>
      <h1><${Verbatim}>${named(run.path)}<//></h1>
      <p class="intro"><${Verbatim}>${run.base_model ?? "–"}<//> · ${whatItIs(run, adapter)}</p>
    </div></div>
    <${First} data=${data} query=${query} />
    <${Merged} merged=${data.merged} gguf=${data.gguf} />
    <${Loss} spec=${data.charts?.loss} run=${run} />
    <${Checkpoints} run=${run} query=${query} session=${session} />
    <${Trained} inspection=${data.inspection} />
    ${data.charts?.heatmap && html`<${Card} title=${t("section.heatmap")}><${Chart} spec=${data.charts.heatmap} testid="heatmap" label=${t("section.heatmap")} /><p class="note">${t("chart.heatmap.update_caption")}</p><//>`}
    <${Files} run=${run} cleanup=${data.cleanup} />
    <${CleanUp} cleanup=${data.cleanup} run=${run} query=${query} reload=${reload} />
    <${Command} text=${data.command} label=${t("page.common.command")} />`;
}
