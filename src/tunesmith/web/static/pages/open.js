// Where a run is opened: by its path, from those that lie under the root, or the demo.
import { amend, api, ended, formatAge, formatNumber, go, html, link, startJob, t, useEffect, useJob, useJobs, useLoad, useState } from "../core.js";
import { Button, Card, Empty, ErrorBox, Field, JobCard, Loading, PathInput, Rich, Table, TextInput, Verbatim } from "../ui.js";

const named = (path) => (path ?? "").replace(/\/+$/, "").split("/").pop() || path;

function OpenForm({ query, session }) {
  const [run, setRun] = useState(query.run ?? session?.run ?? "");
  const [base, setBase] = useState(query.base ?? session?.base ?? "");
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    if (query.run) setRun(query.run);
  }, [query.run]);
  const open = async () => {
    if (!run.trim() || busy) return;
    setBusy(true);
    setError(null);
    try {
      await api.get("run", { path: run.trim(), base: base.trim() });
      go("overview", { run: run.trim(), base: base.trim() || null });
    } catch (failure) {
      setError(failure);
    } finally {
      setBusy(false);
    }
  };
  return html`<${Card} title=${t("page.open.by_path")}>
    <form class="open-form" onsubmit=${(event) => (event.preventDefault(), open())}>
      <${Field} label=${t("page.open.run")} hint=${t("page.open.run.hint")}><${PathInput} pick="run" value=${run} onchange=${setRun} testid="run-path" placeholder="out/my-run" /><//>
      <${Field} label=${t("page.open.base")} hint=${t("page.open.base.hint")}><${TextInput} mono value=${base} onchange=${setBase} testid="base-path" placeholder=${t("page.open.base.placeholder")} /><//>
      <${Button} kind="primary" type="submit" testid="run-open" disabled=${busy || !run.trim()}>${t(busy ? "page.open.opening" : "page.open.open")}<//>
    </form>
    <${ErrorBox} error=${error} />
  <//>`;
}

const COLUMNS = () => [
  { key: "name", title: t("page.open.column.run"), kind: "full", render: (run) => html`<a class="run-link" href=${link("overview", { run: run.path, base: null })}><${Verbatim}>${run.name}<//></a><${Verbatim}><span class="run-path">${run.path}</span><//>` },
  { key: "base_model", title: t("page.open.column.base"), render: (run) => html`<${Verbatim} title=${run.base_model}>${named(run.base_model) || "–"}<//>` },
  { key: "tool", title: t("page.open.column.tool"), render: (run) => (run.tool ? t(`writer.${run.tool}`) : "–") },
  { key: "steps", title: t("page.open.column.steps"), numeric: true, render: (run) => formatNumber(run.steps) },
  { key: "last_loss", title: t("page.open.column.loss"), numeric: true, render: (run) => formatNumber(run.last_loss, 3) },
  { key: "eval_loss", title: t("page.open.column.eval_loss"), numeric: true, render: (run) => formatNumber(run.eval_loss, 3) },
  { key: "modified_s", title: t("page.open.column.age"), numeric: true, render: (run) => formatAge(run.modified_s) },
];

function Runs({ found }) {
  if (found.loading) return html`<${Card} title=${t("page.open.found")}><${Loading} text=${t("page.open.searching")} /><//>`;
  if (found.error) return html`<${Card} title=${t("page.open.found")}><${ErrorBox} error=${found.error} retry=${found.reload} /><//>`;
  const { runs, truncated } = found.data;
  return html`<${Card} title=${t("page.open.found")} kind="stack" actions=${html`<${Button} onclick=${found.reload}>${t("page.open.again")}<//>`}>
    ${runs.length ? html`<${Table} columns=${COLUMNS()} rows=${runs.map((run) => ({ ...run, key: run.path }))} testid="run-table" label=${t("page.open.found")} />` : html`<${Empty} title=${t("page.open.none")} hint=${t("page.open.none.hint")} />`}
    ${truncated && html`<p class="note">${t("page.open.truncated")}</p>`}
  <//>`;
}

function Demo({ query, session, prominent }) {
  const jobs = useJobs();
  const known = jobs.find((job) => job.kind === "demo" && (!query.job || job.id === query.job)) ?? null;
  const job = useJob(known?.id ?? null);
  const [error, setError] = useState(null);
  const start = () =>
    startJob("demo").then((started) => {
      setError(null);
      amend({ job: started.id });
    }, setError);
  const made = session?.demo?.run ?? (job?.state === "done" ? `${job.result?.path ?? ""}/run` : null);
  const running = job && !ended(job);
  const begin = html`<${Button} kind=${prominent ? "primary" : "plain"} onclick=${start} testid="demo-start" disabled=${running}>${t(made ? "page.open.demo.again" : "page.open.demo.make")}<//>`;
  return html`<${Card} title=${t("page.open.demo")} testid="demo">
    <p class="lead"><${Rich} k="page.open.demo.what" /></p>
    ${made && !running
      ? html`<div class="actions"><${Button} kind="primary" href=${link("overview", { run: made, base: "demo", job: null })} testid="demo-open">${t("page.open.demo.open")}<//></div>`
      : !running && html`<div class="actions">${begin}<span class="quiet">${t("page.open.demo.takes")}</span></div>`}
    <${ErrorBox} error=${error} />
    ${job && (running || job.state !== "done") && html`<${JobCard} job=${job} />`}
  <//>`;
}

const Steps = () =>
  html`<${Card} title=${t("page.open.steps")}><ol class="steps">${["open", "compare", "merge", "verify"].map((step) => html`<li><span><${Rich} k=${`page.open.step.${step}`} /></span></li>`)}</ol><//>`;

export default function Page({ query, session }) {
  const jobs = useJobs();
  // What was trained since is found as well.
  const done = jobs.filter((job) => ended(job) && (job.kind === "train" || job.kind === "demo")).length;
  const found = useLoad(`runs ${done}`, () => api.get("runs"));
  const empty = found.data && !found.data.runs.length;
  const parts = [
    html`<${OpenForm} key="form" query=${query} session=${session} />`,
    html`<${Runs} key="runs" found=${found} />`,
    html`<${Demo} key="demo" query=${query} session=${session} prominent=${empty} />`,
  ];
  return html`
    <h1>${t("page.open.title")}</h1>
    <p class="intro">${t("page.open.intro")}</p>
    ${empty ? [parts[2], parts[0], parts[1]] : parts}
    <${Steps} />
    ${session?.root && html`<p class="note">${t("page.open.root")} <${Verbatim}>${session.root}<//></p>`}`;
}
