// Merge & export: base and adapter become one model, and that model what others can load; each after a look at it.
import { amend, ended, figure, formatSeconds, go, html, startJob, t, useJob, useRun, useState } from "../core.js";
import { Button, Card, Command, ErrorBox, Field, Findings, Icon, Loading, PathInput, Rich, Select, Table, Tabs, TextInput, confirmDialog, useKeys } from "../ui.js";
import { NoRun } from "./chat.js";
import { Drift } from "./drift.js";
import { ExportJob, Preflight, useExports, useLook, useShownJob } from "./exports.js";
import { Gguf } from "./gguf.js";
import { Push } from "./push.js";
import { Quantize } from "./quantize.js";
import { inRoot, useKept, useRunOf } from "./variants.js";

const DTYPES = ["auto", "bf16", "fp16", "fp32"];
const ROUNDINGS = ["auto", "faithful", "nearest", "stochastic", "calibrated", "calibrated-free"];
const PANELS = { merge: Merge, quantize: Quantize, drift: Drift, gguf: Gguf, push: Push };
const TABS = Object.keys(PANELS);

/** The page: a tab for each form that a fine-tune is handed on in. */
export default function Page({ query, session }) {
  const { run, base } = useRunOf(query, session);
  const { data, error } = useRun({ run, base });
  const asked = useJob(query.job);
  const title = html`<h1>${t("page.export.title")}</h1>`;
  if (!run) return html`${title}<${NoRun} />`;
  if (error && !data) return html`${title}<${ErrorBox} error=${error} />`;
  if (!data) return html`${title}<${Loading} text=${t("page.common.reading_run")} />`;
  const tab = TABS.find((name) => name === query.tab) ?? TABS.find((name) => name === asked?.kind) ?? "merge";
  const tabs = TABS.map((key) => ({ key, title: t(`page.export.tab.${key}`), testid: `export-tab-${key}` }));
  return html`<div class="merge-page">
    ${title}
    <${Tabs} tabs=${tabs} value=${tab} label=${t("page.export.title")} onchange=${(next) => amend({ tab: next, job: null })}>
      <p class="intro">${t(`page.${tab}.intro`)}</p>
      <${PANELS[tab]} key=${tab} run=${run} base=${base} data=${data} query=${query} session=${session} />
    <//>
  </div>`;
}

function Merge(form) {
  const mine = useExports("merge", form);
  const job = useShownJob("merge", form.query, mine.find((one) => !ended(one)));
  return html`
    <${ExportJob} job=${job} name="merge" title=${t("page.merge.running")} cancelled=${t("page.merge.cancelled")} done=${(ended) => html`<${Done} job=${ended} merged=${ended.result} root=${form.session?.root} />`} />
    ${job?.state === "done" ? html`<${Another} ...${form} />` : (!job || ended(job)) && html`<${Form} ...${form} />`}`;
}

/** The form again, behind a fold: it looks at the disk only once it is opened. */
function Another(form) {
  const [open, setOpen] = useState(false);
  return html`<details open=${open} ontoggle=${(event) => setOpen(event.currentTarget.open)}><summary>${t("page.merge.another")}</summary>${open && html`<${Form} ...${form} />`}</details>`;
}

/** Where a merge goes unless somewhere else is asked for: beside the run. */
const proposed = (path, checkpoint) => `${path.replace(/[\\/]+$/, "")}-${checkpoint === "final" ? "" : `${checkpoint}-`}merged`;

const FACTS = (plan) => [
  ["merge.updated", t("merge.updated_of", { count: plan.changed, total: plan.tensors }), null],
  ["merge.dtype", plan.dtype, null],
  ["merge.rounding", t(`merge.rounding.${plan.rounding}`), null],
];

function Form({ run, base, data, query, session }) {
  const saved = data.inspection.run.checkpoints;
  const defaults = session?.defaults?.merge || {};
  const [own, setOwn] = useKept(`merge.${run}`, {});
  const checkpoint = (saved.find((one) => one.name === query.variant) || saved.at(-1))?.name || "final";
  const form = { base, dtype: defaults.dtype || "auto", rounding: defaults.rounding || "auto", shard_size: "", out: proposed(run, checkpoint), ...own, checkpoint };
  const set = (part) => setOwn((before) => ({ ...before, ...part }));
  const params = { run, base: form.base || null, checkpoint, out: form.out, dtype: form.dtype, rounding: form.rounding, shard_size: form.shard_size.trim() || null };
  const look = useLook("merge", params, Boolean(form.out.trim()));
  const [error, setError] = useState(null);
  const start = async () => {
    const force = Boolean(look.plan?.preflight.target_not_empty);
    const asked = { title: t("page.merge.replace"), text: t("page.merge.replace_text", { out: form.out }), danger: true, confirm: t("page.merge.replace_go") };
    if (force && !(await confirmDialog(asked))) return;
    try {
      const job = await startJob("merge", { ...params, force, dry_run: false });
      setError(null);
      amend({ job: job.id });
    } catch (problem) {
      setError(problem);
    }
  };
  const ready = form.out.trim() && !look.error;
  useKeys({ run: ready ? start : null });
  const options = (names, key) => names.map((value) => ({ value, label: t(`page.merge.${key}.${value}`) }));
  return html`<div class="merge-columns">
    <${Card} title=${t("page.merge.form")}>
      <${Field} label=${t("merge.adapter")}><${Select} testid="merge-checkpoint" value=${checkpoint} onchange=${(variant) => amend({ variant })}
        options=${saved.map((one) => ({ value: one.name, label: one.is_best ? `${one.name} · ${t("checkpoint.best")}` : one.name }))} /><//>
      <${Field} label=${t("merge.base")} hint=${t("page.merge.base_hint", { base: data.inspection.run.base_model })}>
        <${PathInput} pick="folder" testid="merge-base" value=${form.base} placeholder=${data.inspection.run.base_model || ""} onchange=${(value) => set({ base: value })} /><//>
      <${Field} label=${t("page.merge.out")} hint=${t("page.merge.out_hint")}><${PathInput} pick="folder" testid="merge-out" value=${form.out} onchange=${(out) => set({ out })} /><//>
      <div class="field-pair">
        <${Field} label=${t("merge.dtype")}><${Select} testid="merge-dtype" value=${form.dtype} options=${options(DTYPES, "dtype")} onchange=${(dtype) => set({ dtype })} /><//>
        <${Field} label=${t("page.merge.shard")} hint=${t("page.merge.shard_hint")}><${TextInput} testid="merge-shard" value=${form.shard_size} placeholder="5GB" onchange=${(shard_size) => set({ shard_size })} /><//>
      </div>
      <${Field} label=${t("merge.rounding")} hint=${t(`page.merge.rounding.${form.rounding}.about`)}><${Select} testid="merge-rounding" value=${form.rounding} options=${options(ROUNDINGS, "rounding")} onchange=${(rounding) => set({ rounding })} /><//>
    <//>
    <${Card} title=${t("page.merge.preflight")}>
      <${Preflight} look=${look} session=${session} facts=${FACTS} />
      ${error && html`<${ErrorBox} error=${error} />`}
      <div class="start-row"><${Button} kind="primary" testid="merge-start" disabled=${!ready} onclick=${start}>${t("page.merge.start")}<//>
        <span class="quiet">${t("page.merge.atomic")}</span></div>
    <//>
  </div>`;
}

function Done({ job, merged, root }) {
  const { plan, kept, nearest } = merged;
  const out = inRoot(plan.out, root);
  const verified = { merged: out, variant: plan.adapters[0].checkpoint, ...(job.params.base ? { base: job.params.base } : {}) };
  const told = [...plan.warnings, ...merged.findings];
  const rows = plan.rounding === "nearest" ? [["merge.chosen", kept]] : [["merge.chosen", kept], ["merge.nearest", nearest]];
  const size = merged.receipts.reduce((sum, one) => sum + one.size_bytes, 0);
  return html`<section class="done-card" data-testid="merge-done" aria-label=${t("page.merge.done")}>
    <h2><${Icon} name="ok" />${t("page.merge.done")}</h2>
    <p><bdi class="path">${plan.out}</bdi> <span class="quiet">${t("page.merge.written", { size, files: merged.receipts.length, time: formatSeconds(merged.seconds) })}</span></p>
    <p class="lead"><${Rich} k="merge.sentence" params=${{ dtype: plan.dtype, unchanged: kept.share_unchanged, gain: kept.gain }} /></p>
    <div class="start-row"><${Button} kind="primary" testid="verify-now" onclick=${() => go("verify", verified)}>${t("page.merge.verify_now")}<//>
      <span class="quiet">${t("page.merge.verify_why")}</span></div>
    <${Table} caption=${t("merge.kept")} rows=${rows.map(([label, one]) => ({ key: label, label, ...one }))} columns=${[
      { key: "label", title: t("merge.rounding"), render: ({ label }) => t(label) },
      { key: "gain", title: t("merge.gain"), numeric: true, render: ({ gain }) => t("unit.share.value", { value: gain }) },
      { key: "unchanged", title: t("merge.unchanged"), numeric: true, render: (one) => t("unit.share.value", { value: one.share_unchanged }) },
      { key: "inside", title: t("merge.error_inside"), numeric: true, render: (one) => figure(one.error_inside) },
      { key: "error", title: t("merge.relative_error"), numeric: true, render: (one) => figure(one.relative_error) },
    ]} />
    ${rows.length > 1 && html`<p class="note">${t("merge.kept.note")}</p>`}
    ${told.length > 0 && html`<${Findings} findings=${told} />`}
    <div class="start-row"><${Button} testid="to-gguf" onclick=${() => amend({ tab: "gguf", job: null, source: out })}>${t("page.export.to_gguf")}<//>
      <${Button} testid="to-push" onclick=${() => amend({ tab: "push", job: null, source: out })}>${t("page.export.to_push")}<//></div>
    <details class="elsewhere"><summary>${t("page.common.command")}</summary><${Command} text=${job.command} /></details>
  </section>`;
}
