// What all forms of an export share: a look before the start, the job on its way, and which models there are.
import { api, ended, formatSeconds, hasText, html, startJob, t, useEffect, useJob, useJobs, useState } from "../core.js";
import { Card, Command, ErrorBox, Field, Findings, PathInput, Verbatim } from "../ui.js";
import { Running } from "./compare.js";
import { inRoot } from "./variants.js";

const LOOK_AFTER_MS = 700;

/** A dry run of a form as it stands, begun when typing rests, and forgotten once it has been read. */
export function useLook(kind, params, ready = true) {
  const [state, setState] = useState({});
  const [id, setId] = useState(null);
  const key = ready ? JSON.stringify(params) : null;
  const job = useJob(id);
  useEffect(() => {
    if (key === null) {
      setState({});
      return undefined;
    }
    setState((before) => ({ ...before, busy: true, error: null }));
    let made = null;
    let gone = false;
    const timer = setTimeout(() => {
      startJob(kind, { ...params, dry_run: true }).then(
        (started) => {
          made = started.id;
          if (gone) forget(made);
          else setId(made);
        },
        (error) => !gone && setState({ error }),
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

/** What a plan says before it is carried out; `facts(plan)` are its own lines: [key, value, good]. */
export function Preflight({ look, session, facts }) {
  if (look.error) return html`<${ErrorBox} error=${look.error} />`;
  if (!look.plan) return html`<p class="quiet" role="status">${t(look.queued ? "page.export.look_queued" : "page.merge.looking")}</p>`;
  const { plan } = look;
  const memory = session?.memory_free_bytes;
  const rows = [
    ["page.merge.disk", t(plan.free_bytes === null ? "page.merge.disk_unknown" : "page.merge.disk_of", { need: plan.write_bytes, free: plan.free_bytes }), plan.free_bytes === null || plan.free_bytes > plan.write_bytes],
    ["page.merge.memory", t(memory ? "page.merge.disk_of" : "page.merge.disk_unknown", { need: plan.memory_bytes, free: memory }), !memory || memory > plan.memory_bytes],
    ["page.merge.target", t(plan.preflight.target_not_empty ? "page.merge.target_full" : "page.merge.target_free"), plan.preflight.target_not_empty ? "warn" : true],
    ["page.merge.time", t("page.merge.about", { time: formatSeconds(plan.seconds) }), null],
    ...facts(plan),
  ];
  return html`<dl class="facts">${rows.map(([key, value, good]) => html`
      <div><dt>${t(key)}</dt><dd class=${{ warn: "is-warn", false: "is-bad" }[good] ?? ""}>
        ${good !== null && html`<span class=${good === true ? "is-good" : ""} aria-hidden="true">${{ true: "✓ ", false: "✗ ", warn: "! " }[good]}</span>`}${value}</dd></div>`)}</dl>
    ${plan.warnings.length > 0 && html`<${Findings} findings=${plan.warnings} />`}
    ${look.command && html`<p class="label">${t("page.common.command")}</p><${Command} text=${look.command.replace(/ --dry-run\b/, plan.preflight.target_not_empty ? " --force" : "")} />`}`;
}

/** The jobs of a kind about a run or what was made of it, the newest first; dry runs are none. */
export function useExports(kind, { run, data, session }) {
  const root = session?.root;
  const own = new Set([run, ...(data.merged || []).map((one) => one.path), ...(data.gguf || []).map((one) => one.path)].map((path) => inRoot(path, root)));
  return useJobs().filter((job) => job.kind === kind && !job.params.dry_run && own.has(inRoot(job.params.run ?? job.params.directory, root)));
}

/** The job of a kind that a tab shows: the one that the address names, or else one of its own. */
export function useShownJob(kind, query, otherwise) {
  const named = useJob(query.job);
  const other = useJob(otherwise?.id);
  if (!query.job) return other;
  return named?.kind === kind && !named.params?.dry_run ? named : named ? other : null;
}

/** A job on its way or at its end; `done(job)` draws its result. */
export function ExportJob({ job, name, title, cancelled, done }) {
  if (!job) return null;
  if (job.lost) return html`<p class="quiet">${t("page.job.lost")}</p>`;
  if (job.state === "failed") return html`<${ErrorBox} error=${job.error} />`;
  if (job.state === "cancelled") return html`<p class="note" role="status" data-testid=${`${name}-cancelled`}>${cancelled}</p>`;
  if (ended(job)) return done(job);
  return html`<${Card} title=${title}><${Running} job=${job} testid=${`${name}-progress`} stopid=${`${name}-cancel`} stop=${t("page.merge.cancel")} />
    <p class="label">${t("page.common.command")}</p><${Command} text=${job.command} /><//>`;
}

/** What a directory holds, in a word: a model, quantized how, a GGUF file, or an adapter. */
export const kindText = (one) => (one.kind === "quantized" ? `${t("page.export.kind.quantized")} ${one.scheme ?? ""}`.trim() : t(`page.export.kind.${one.kind}`));

/** The word for a certificate's answer. */
export const answerText = (answer) => (answer && hasText(`verdict.${answer}`) ? t(`verdict.${answer}`) : t("verdict.not_verified"));

/** A path, with what is known as chips below it. */
export function PathChoice({ label, hint, value, onchange, known, testid }) {
  return html`<${Field} label=${label} hint=${hint}><${PathInput} pick="folder" testid=${testid} value=${value} onchange=${onchange} /><//>
    ${known.length > 0 && html`<div class="chips" role="group" aria-label=${t("page.verify.found")}>
      ${known.map((one) => html`<button type="button" key=${one.path} class="chip" aria-pressed=${one.path === value} onclick=${() => onchange(one.path)}><${Verbatim}>${one.path}<//> <span class="quiet">${kindText(one)}</span></button>`)}</div>`}`;
}

/** A group of boxes to tick, as chips. */
export function Ticks({ legend, options, value, onchange, testid, about }) {
  const toggle = (one) => onchange(options.map((option) => option.value).filter((option) => (option === one ? !value.includes(one) : value.includes(option))));
  return html`<fieldset class="chosen" data-testid=${testid}><legend>${legend}</legend>
    <div class="chips">${options.map((one) => html`<label key=${one.value} class="chip"><input type="checkbox" value=${one.value} checked=${value.includes(one.value)} onchange=${() => toggle(one.value)} /><${Verbatim}>${one.label ?? one.value}<//></label>`)}</div>
    ${about && html`<p class="hint-line">${about}</p>`}
  </fieldset>`;
}
