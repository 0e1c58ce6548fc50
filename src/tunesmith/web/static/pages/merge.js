// Merge: base and adapter become one model, after a look at what it takes, and with a way to stop it.
import {
  amend, api, ended, figure, formatSeconds, go, html, startJob, t, useEffect, useJob, useRun, useState,
} from "../core.js";
import { Button, Card, Command, ErrorBox, Field, Findings, Icon, Loading, PathInput, Rich, Select, Table, TextInput, confirmDialog, useKeys } from "../ui.js";
import { NoRun } from "./chat.js";
import { Running } from "./compare.js";
import { inRoot, useJobsOf, useKept, useRunOf } from "./variants.js";

const DTYPES = ["auto", "bf16", "fp16", "fp32"];
const ROUNDINGS = ["auto", "faithful", "nearest", "stochastic", "calibrated", "calibrated-free"];
const LOOK_AFTER_MS = 700;

/** The page: a form with what the merge takes beside it, then the merge. */
export default function Page({ query, session }) {
  const { run, base } = useRunOf(query, session);
  const { data, error } = useRun({ run, base });
  const mine = useJobsOf(run, session).filter((job) => job.kind === "merge" && !job.params.dry_run);
  const id = query.job || mine.find((job) => !ended(job))?.id;
  const found = useJob(id);
  const job = found?.params?.dry_run ? null : found; // the top bar leads to a look, too
  if (!run) return html`<h1>${t("page.nav.merge")}</h1><${NoRun} />`;
  if (error && !data) return html`<h1>${t("page.nav.merge")}</h1><${ErrorBox} error=${error} />`;
  if (!data) return html`<h1>${t("page.nav.merge")}</h1><${Loading} text=${t("page.common.reading_run")} />`;
  const form = { run, base, data, query, session };
  return html`<div class="merge-page">
    <h1>${t("page.nav.merge")}</h1>
    <p class="intro">${t("page.merge.intro")}</p>
    ${job && html`<${MergeJob} job=${job} root=${session?.root} />`}
    ${job?.state === "done" ? html`<${Another} ...${form} />` : (!job || ended(job)) && html`<${Form} ...${form} />`}
  </div>`;
}

/** The form again, behind a fold: it looks at the disk only once it is opened. */
function Another(form) {
  const [open, setOpen] = useState(false);
  return html`<details open=${open} ontoggle=${(event) => setOpen(event.currentTarget.open)}><summary>${t("page.merge.another")}</summary>${open && html`<${Form} ...${form} />`}</details>`;
}

/** Where a merge goes unless somewhere else is asked for: beside the run. */
const proposed = (path, checkpoint) => `${path.replace(/[\\/]+$/, "")}-${checkpoint === "final" ? "" : `${checkpoint}-`}merged`;

function Form({ run, base, data, query, session }) {
  const saved = data.inspection.run.checkpoints;
  const defaults = session?.defaults?.merge || {};
  const [own, setOwn] = useKept(`merge.${run}`, {});
  const checkpoint = (saved.find((one) => one.name === query.variant) || saved.at(-1))?.name || "final";
  const form = { base, dtype: defaults.dtype || "auto", rounding: defaults.rounding || "auto", shard_size: "", out: proposed(run, checkpoint), ...own, checkpoint };
  const set = (part) => setOwn((before) => ({ ...before, ...part }));
  const params = { run, base: form.base || null, checkpoint, out: form.out, dtype: form.dtype, rounding: form.rounding, shard_size: form.shard_size.trim() || null };
  const look = useLook(params);
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
      <${Preflight} look=${look} session=${session} />
      ${error && html`<${ErrorBox} error=${error} />`}
      <div class="start-row"><${Button} kind="primary" testid="merge-start" disabled=${!ready} onclick=${start}>${t("page.merge.start")}<//>
        <span class="quiet">${t("page.merge.atomic")}</span></div>
    <//>
  </div>`;
}

/** A dry run of the form as it stands, begun when typing rests, and forgotten once it has been read. */
function useLook(params) {
  const [state, setState] = useState({});
  const [id, setId] = useState(null);
  const key = JSON.stringify(params);
  const job = useJob(id);
  useEffect(() => {
    setState((before) => ({ ...before, busy: true, error: null }));
    let made = null;
    let gone = false;
    const timer = setTimeout(() => {
      if (!params.out.trim()) return;
      startJob("merge", { ...params, dry_run: true }).then(
        (started) => {
          made = started.id;
          if (gone) forget(made);
          else setId(made);
        },
        (error) => !gone && setState({ error: error }),
      );
    }, LOOK_AFTER_MS);
    return () => {
      gone = true;
      clearTimeout(timer);
      if (made) forget(made);
    };
  }, [key]);
  useEffect(() => {
    if (!job || job.id !== id || !ended(job) || job.lost) return;
    setState(job.state === "done" ? { plan: job.result, command: job.command } : { error: job.error });
    setId(null);
    forget(job.id, true);
  }, [job?.state, id]);
  return { ...state, queued: job?.state === "queued" };
}

const forgotten = new Set();

/** Take a dry run off the server's list; one that is still at work is stopped first. */
function forget(id, over = false) {
  if (forgotten.has(id)) return;
  forgotten.add(id);
  const drop = () => api.delete(`jobs/${id}`).catch(() => null);
  if (over) drop();
  else api.post(`jobs/${id}/cancel`).then(() => setTimeout(drop, LOOK_AFTER_MS), () => null);
}

function Preflight({ look, session }) {
  if (look.error) return html`<${ErrorBox} error=${look.error} />`;
  if (!look.plan) return html`<p class="quiet" role="status">${t(look.queued ? "page.merge.look_queued" : "page.merge.looking")}</p>`;
  const { plan } = look;
  const memory = session?.memory_free_bytes;
  const rows = [
    ["page.merge.disk", t(plan.free_bytes === null ? "page.merge.disk_unknown" : "page.merge.disk_of", { need: plan.write_bytes, free: plan.free_bytes }), plan.free_bytes === null || plan.free_bytes > plan.write_bytes],
    ["page.merge.memory", t(memory ? "page.merge.disk_of" : "page.merge.disk_unknown", { need: plan.memory_bytes, free: memory }), !memory || memory > plan.memory_bytes],
    ["page.merge.target", t(plan.preflight.target_not_empty ? "page.merge.target_full" : "page.merge.target_free"), plan.preflight.target_not_empty ? "warn" : true],
    ["page.merge.time", t("page.merge.about", { time: formatSeconds(plan.seconds) }), null],
    ["merge.updated", t("merge.updated_of", { count: plan.changed, total: plan.tensors }), null],
    ["merge.dtype", plan.dtype, null],
    ["merge.rounding", t(`merge.rounding.${plan.rounding}`), null],
  ];
  return html`<dl class="facts">${rows.map(([key, value, good]) => html`
      <div><dt>${t(key)}</dt><dd class=${{ warn: "is-warn", false: "is-bad" }[good] ?? ""}>
        ${good !== null && html`<span class=${good === true ? "is-good" : ""} aria-hidden="true">${{ true: "✓ ", false: "✗ ", warn: "! " }[good]}</span>`}${value}</dd></div>`)}</dl>
    ${plan.warnings.length > 0 && html`<${Findings} findings=${plan.warnings} />`}
    ${look.command && html`<p class="label">${t("page.common.command")}</p><${Command} text=${look.command.replace(/ --dry-run\b/, plan.preflight.target_not_empty ? " --force" : "")} />`}`;
}

function MergeJob({ job, root }) {
  if (job.lost) return html`<p class="quiet">${t("page.job.lost")}</p>`;
  if (job.state === "failed") return html`<${ErrorBox} error=${job.error} />`;
  if (job.state === "cancelled") return html`<p class="note" role="status" data-testid="merge-cancelled">${t("page.merge.cancelled")}</p>`;
  if (ended(job)) return html`<${Done} job=${job} merged=${job.result} root=${root} />`;
  return html`<${Card} title=${t("page.merge.running")}><${Running} job=${job} testid="merge-progress" stopid="merge-cancel" stop=${t("page.merge.cancel")} />
    <p class="label">${t("page.common.command")}</p><${Command} text=${job.command} /><//>`;
}

function Done({ job, merged, root }) {
  const { plan, kept, nearest } = merged;
  const verified = { merged: inRoot(plan.out, root), variant: plan.adapters[0].checkpoint, ...(job.params.base ? { base: job.params.base } : {}) };
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
    <details class="elsewhere"><summary>${t("page.common.command")}</summary><${Command} text=${job.command} /></details>
  </section>`;
}
