// Report: everything this session has found, as one file to keep and to hand on.
import { amend, currentLang, ended, formatAge, html, startJob, t, useJob, useRun, useState } from "../core.js";
import { Button, Card, Command, DownloadButton, ErrorBox, Field, Loading, Select, TextInput, useKeys } from "../ui.js";
import { NoRun } from "./chat.js";
import { Running } from "./compare.js";
import { inRoot, nameOf, useJobsOf, useKept, useRunOf } from "./variants.js";

/** The page: what goes in, then the report itself. */
export default function Page({ query, session }) {
  const { run, base } = useRunOf(query, session);
  const { data, error } = useRun({ run, base });
  const jobs = useJobsOf(run, session);
  const id = query.job || jobs.find((job) => job.kind === "report")?.id;
  const job = useJob(id);
  if (!run) return html`<h1>${t("page.nav.report")}</h1><${NoRun} />`;
  if (error && !data) return html`<h1>${t("page.nav.report")}</h1><${ErrorBox} error=${error} />`;
  return html`<div class="report-page">
    <h1>${t("page.nav.report")}</h1>
    <p class="intro">${t("page.report.intro")}</p>
    ${!data ? html`<${Loading} text=${t("page.common.reading_run")} />` : html`<${Form} run=${run} base=${base} data=${data} root=${session?.root} jobs=${jobs} busy=${job && !ended(job)} />`}
    ${id && !job && html`<${Loading} />`}
    ${job && html`<${ReportJob} job=${job} run=${run} />`}
  </div>`;
}

const NONE = "";

function Form({ run, base, data, jobs, busy, root }) {
  const [own, setOwn] = useKept(`report.${run}`, {});
  const [error, setError] = useState(null);
  const done = (kind) => jobs.filter((job) => job.kind === kind && job.state === "done");
  const comparisons = done("compare");
  const judged = done("verify");
  const merged = [...new Set([...judged.map((job) => inRoot(job.params.directory, root)), ...(data.merged || []).map((one) => inRoot(one.path, root))])];
  const still = (value, among) => (among.includes(value) ? value : undefined);
  const form = {
    out: own.out ?? `${run.replace(/[\\/]+$/, "")}-report.html`,
    comparison: own.comparison === NONE ? NONE : still(own.comparison, comparisons.map((job) => job.id)) ?? comparisons[0]?.id ?? NONE,
    merged: own.merged === NONE ? NONE : still(own.merged, merged) ?? merged[0] ?? NONE,
  };
  const verdicts = judged.filter((job) => inRoot(job.params.directory, root) === form.merged);
  form.verdict = own.verdict === NONE ? NONE : still(own.verdict, verdicts.map((job) => job.id)) ?? verdicts[0]?.id ?? NONE;
  const set = (part) => setOwn((before) => ({ ...before, ...part }));
  const start = () =>
    startJob("report", { run, base: base || null, merged: form.merged || null, comparison_job: form.comparison || null, verdict_job: form.verdict || null, out: form.out.trim() }).then(
      (job) => { setError(null); amend({ job: job.id }); },
      setError,
    );
  const ready = !busy && form.out.trim();
  useKeys({ run: ready ? start : null });
  const told = (job, name) => ({ value: job.id, label: `${name} · ${formatAge(job.ended_s)}` });
  return html`<${Card} title=${t("page.report.form")}>
    <${Field} label=${t("page.report.comparison")} hint=${form.comparison ? null : t("page.report.comparison_now")}>
      <${Select} testid="report-comparison" value=${form.comparison} onchange=${(comparison) => set({ comparison })}
        options=${[...comparisons.map((job) => told(job, (job.params.variants || []).map(nameOf).join(" / "))), { value: NONE, label: t("page.report.make_now") }]} /><//>
    <${Field} label=${t("page.report.merged")}>
      <${Select} testid="report-merged" value=${form.merged} onchange=${(value) => set({ merged: value })} options=${[...merged.map((value) => ({ value, label: value })), { value: NONE, label: t("page.report.without") }]} /><//>
    ${form.merged && html`<${Field} label=${t("page.report.verdict")} hint=${form.verdict ? null : t("page.report.verdict_now")}>
      <${Select} testid="report-verdict" value=${form.verdict} onchange=${(verdict) => set({ verdict })} options=${[...verdicts.map((job) => told(job, nameOf(job.params.directory))), { value: NONE, label: t("page.report.make_now") }]} /><//>`}
    <${Field} label=${t("page.report.out")} hint=${t("page.report.out_hint")}><${TextInput} mono testid="report-out" value=${form.out} onchange=${(out) => set({ out })} /><//>
    <${ErrorBox} error=${error} />
    <div class="start-row"><${Button} kind="primary" testid="report-start" disabled=${!ready} onclick=${start}>${t("page.report.start")}<//></div>
  <//>`;
}

function ReportJob({ job, run }) {
  if (job.lost) return html`<p class="quiet">${t("page.job.lost")}</p>`;
  if (job.state === "failed") return html`<${ErrorBox} error=${job.error} />`;
  if (job.state === "cancelled") return html`<p class="note" role="status">${t("page.common.job_cancelled")}</p>`;
  if (!ended(job)) return html`<${Card} title=${t("page.report.running")}><${Running} job=${job} testid="report-progress" stopid="report-cancel" /><//>`;
  const name = nameOf(run);
  const path = `jobs/${job.id}/download`;
  return html`<section class="report-done" data-testid="report-done" aria-label=${t("page.report.done")}>
    <div class="batch-head"><p><strong>${t("page.report.done")}</strong> <bdi class="path">${job.result?.path || job.params.out}</bdi></p>
      <div class="downloads">
        <${DownloadButton} path=${path} query=${{ format: "html" }} filename=${`${name}-report.html`} testid="report-html">HTML<//>
        <${DownloadButton} path=${path} query=${{ format: "json" }} filename=${`${name}-report.json`} testid="report-json">JSON<//></div></div>
    <iframe class="report-frame" sandbox="allow-scripts" src=${`/api/v1/${path}?format=html&lang=${currentLang()}&theme=${document.documentElement.dataset.theme ?? "auto"}`} title=${t("page.report.done")} data-testid="report-frame"></iframe>
    <${Command} text=${job.command} label=${t("page.common.command")} />
  </section>`;
}
