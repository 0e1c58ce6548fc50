// Push: a model to a hub, after a look at what goes up, what stays here, and what the card says.
import { amend, currentLang, ended, formatAge, formatBytes, html, startJob, t, useJob, useState } from "../core.js";
import { Button, Card, Command, ErrorBox, Field, Findings, Icon, Loading, Select, Table, TextInput, Toggle, Verbatim, confirmDialog, useKeys } from "../ui.js";
import { ExportJob, PathChoice, answerText, useExports, useShownJob } from "./exports.js";
import { Running } from "./compare.js";
import { inRoot, nameOf, useKept } from "./variants.js";

const HUBS = ["huggingface", "modelscope"];
const ADDRESSES = /^https:\/\//;

/** The tab: what goes where, then all of it shown, then the push. */
export function Push(form) {
  const mine = useExports("push", form);
  const job = useShownJob("push", form.query, mine.find((one) => !ended(one)));
  return html`
    <${ExportJob} job=${job} name="push" title=${t("page.push.running")} cancelled=${t("page.push.cancelled")} done=${(over) => html`<${Done} job=${over} pushed=${over.result} />`} />
    ${(!job || ended(job)) && html`<${Form} ...${form} />`}`;
}

/** What there is to push of a run: what was made of it, and its adapter. */
const sourcesOf = (run, data, root) => [
  ...(data.merged || []).map((one) => ({ ...one, path: inRoot(one.path, root) })),
  ...(data.gguf || []).map((one) => ({ kind: "gguf", path: inRoot(one.path, root) })),
  { kind: "adapter", path: inRoot(run, root) },
];

/** Where a model to measure lies, whether or not it was given a name of its own. */
const placeOf = (directory) => (directory.includes("=") ? directory.slice(directory.indexOf("=") + 1) : directory);

/** Ended jobs whose figures the card may show: evaluations of the run, and drifts in which the directory has a row. */
function useFigures(about, directory) {
  const done = (jobs) => jobs.filter((job) => job.state === "done");
  const root = about.session?.root;
  const holds = (job) => (job.params.directories ?? []).some((one) => inRoot(placeOf(one), root) === inRoot(directory, root));
  return { evaluation: done(useExports("evaluate", about)), drift: done(useExports("drift", about)).filter(holds) };
}

/** A job to choose: what it was about, and when it ended. */
const toldOf = (job) => ({ value: job.id, label: `${(job.params.variants ?? job.params.directories ?? []).map(nameOf).join(" / ")} · ${formatAge(job.ended_s)}` });

function Form({ run, data, query, session }) {
  const root = session?.root;
  const known = sourcesOf(run, data, root);
  const models = known.filter((one) => one.kind === "model");
  const [own, setOwn] = useKept(`push.${run}`, {});
  const [card, setCard] = useState(null); // a card that was edited
  const [error, setError] = useState(null);
  const [planned, setPlanned] = useState(null); // the dry run, and of which form it was
  const form = {
    directory: (known.find((one) => one.certificate) ?? known[0]).path, repo_id: "", to: "huggingface", private: true, revision: "", base_model: "", licence: "", data: "", model: "",
    language: currentLang(), evaluation: "", drift: "", unverified: false, replace: false, ...own, ...(query.source ? { directory: query.source } : {}),
  };
  const set = (part) => {
    setOwn((before) => ({ ...before, ...part }));
    if (query.source && "directory" in part) amend({ source: null });
  };
  const gguf = form.directory.endsWith(".gguf");
  const text = (name) => form[name].trim() || null;
  const adapter = inRoot(form.directory, root) === inRoot(run, root);
  const figures = useFigures({ run, data, session }, form.directory.trim());
  const figuresOf = (name) => figures[name].find((job) => job.id === form[name])?.id ?? null;
  const params = {
    directory: form.directory.trim(), repo_id: form.repo_id.trim(), to: form.to, private: form.private, revision: text("revision"), unverified: form.unverified,
    replace: form.replace, run: adapter ? null : run, model: gguf ? text("model") || models[0]?.path || null : null, base_model: text("base_model"), licence: text("licence"),
    data: text("data"), card_text: card, language: form.language,
    evaluation_job: figuresOf("evaluation"), drift_job: figuresOf("drift"),
  };
  const key = JSON.stringify(params);
  const look = () => startJob("push", { ...params, dry_run: true }).then((job) => { setError(null); setPlanned({ id: job.id, key }); }, setError);
  const ready = params.directory && /^[^/\s]+\/[^/\s]+$/.test(params.repo_id);
  useKeys({ run: ready ? look : null });
  return html`<${Card} title=${t("page.push.form")}>
      <${PathChoice} label=${t("page.push.directory")} hint=${t("page.push.directory_hint")} testid="push-directory" value=${form.directory} known=${known} onchange=${(directory) => set({ directory })} />
      ${gguf && html`<${Field} label=${t("page.push.model")} hint=${t("page.push.model_hint")}><${TextInput} mono testid="push-model" value=${form.model} placeholder=${models[0]?.path ?? ""} onchange=${(model) => set({ model })} /><//>`}
      <div class="field-pair">
        <${Field} label=${t("page.push.to")}><${Select} testid="push-to" value=${form.to} options=${HUBS.map((value) => ({ value, label: t(`page.push.to.${value}`) }))} onchange=${(to) => set({ to })} /><//>
        <${Field} label=${t("page.push.repo")} hint=${t("page.push.repo_hint")}><${TextInput} mono testid="push-repo" value=${form.repo_id} placeholder="me/model" onchange=${(repo_id) => set({ repo_id })} /><//>
      </div>
      <${Field} label=${t("page.push.private")} hint=${t("page.push.private_hint")}><${Toggle} testid="push-private" value=${form.private} onchange=${(value) => set({ private: value })} /><//>
      <details class="settings-fold"><summary>${t("page.push.more")}</summary><div class="settings-form">
        <${Field} label=${t("page.push.language")}><${Select} testid="push-language" value=${form.language} options=${[{ value: "zh", label: "中文" }, { value: "en", label: "English" }]} onchange=${(language) => set({ language })} /><//>
        <${Field} label=${t("page.push.data")} hint=${t("page.push.data_hint")}><${TextInput} testid="push-data" value=${form.data} onchange=${(value) => set({ data: value })} /><//>
        ${["evaluation", "drift"].map((name) => figures[name].length > 0 && html`<${Field} key=${name} label=${t(`page.push.${name}`)} hint=${t(`page.push.${name}_hint`)}>
          <${Select} testid=${`push-${name}`} value=${figuresOf(name) ?? ""} onchange=${(id) => set({ [name]: id })} options=${[{ value: "", label: t("page.push.not_on_card") }, ...figures[name].map(toldOf)]} /><//>`)}
        <${Field} label=${t("page.push.base_model")} hint=${t("page.push.base_model_hint")}><${TextInput} mono testid="push-base" value=${form.base_model} placeholder="owner/name" onchange=${(base_model) => set({ base_model })} /><//>
        <${Field} label=${t("page.push.licence")} hint=${t("page.push.licence_hint")}><${TextInput} mono testid="push-licence" value=${form.licence} placeholder="apache-2.0" onchange=${(licence) => set({ licence })} /><//>
        <${Field} label=${t("page.push.revision")} hint=${t("page.push.revision_hint")}><${TextInput} mono testid="push-revision" value=${form.revision} placeholder="main" onchange=${(revision) => set({ revision })} /><//>
        <${Field} label=${t("page.push.replace")} hint=${t("page.push.replace_hint")}><${Toggle} testid="push-replace" value=${form.replace} onchange=${(replace) => set({ replace })} /><//>
        <${Field} label=${t("page.push.unverified")} hint=${t("page.push.unverified_hint")}><${Toggle} testid="push-unverified" value=${form.unverified} onchange=${(unverified) => set({ unverified })} /><//>
      </div></details>
      <${ErrorBox} error=${error} />
      <div class="start-row"><${Button} kind=${planned?.key === key ? "plain" : "primary"} testid="push-look" disabled=${!ready} onclick=${look}>${t("page.push.look")}<//>
        <span class="quiet">${t("page.push.sends_nothing")}</span></div>
    <//>
    ${planned && html`<${Look} planned=${planned} fresh=${planned.key === key} params=${params} card=${card} setCard=${setCard} />`}`;
}

/** What the dry run found, and the push itself, which asks once more. */
function Look({ planned, fresh, params, card, setCard }) {
  const job = useJob(planned.id);
  const [error, setError] = useState(null);
  if (!job) return html`<${Loading} />`;
  if (job.lost) return html`<p class="quiet">${t("page.job.lost")}</p>`;
  if (job.state === "failed") return html`<${ErrorBox} error=${job.error} />`;
  if (job.state === "cancelled") return html`<p class="note" role="status">${t("page.common.job_cancelled")}</p>`;
  if (!ended(job)) return html`<${Card} title=${t("page.push.looking")}><${Running} job=${job} testid="push-looking" stopid="push-look-cancel" /><//>`;
  const plan = job.result;
  const where = { repo: plan.repo_id, hub: t(`page.push.to.${plan.to}`), files: plan.files.length, size: plan.size_bytes, visibility: t(plan.private ? "page.push.is_private" : "page.push.is_public") };
  const push = async () => {
    const asked = { title: t("page.push.ask"), text: t("page.push.ask_text", where), danger: true, confirm: t("page.push.go") };
    if (!(await confirmDialog(asked))) return;
    startJob("push", { ...params, dry_run: false, plan_job: job.id }).then((started) => { setError(null); amend({ job: started.id }); }, setError);
  };
  return html`<section class="card push-plan" data-testid="push-plan" aria-label=${t("page.push.plan")}>
    <h2>${t("page.push.plan")}</h2>
    <dl class="facts">
      <div><dt>${t("page.push.repo")}</dt><dd><${Verbatim}>${plan.repo_id}<//> · ${where.hub} · <strong>${where.visibility}</strong></dd></div>
      <div><dt>${t("page.push.endpoint")}</dt><dd><${Verbatim}>${plan.endpoint}<//>${plan.revision && html` · <${Verbatim}>${plan.revision}<//>`}</dd></div>
      <div><dt>${t("page.push.kind")}</dt><dd>${t(`page.export.kind.${plan.kind}`)}</dd></div>
      <div><dt>${t("page.push.base_model")}</dt><dd><${Verbatim}>${plan.base_model ?? "–"}<//></dd></div>
      <div><dt>${t("page.push.licence")}</dt><dd><${Verbatim}>${plan.licence ?? "–"}<//></dd></div>
      ${plan.kind !== "adapter" && html`<div><dt>${t("page.push.verified")}</dt><dd class=${plan.verified ? "is-good" : "is-warn"}>${answerText(plan.verified)}</dd></div>`}
    </dl>
    ${plan.findings.length > 0 && html`<${Findings} findings=${plan.findings} testid="push-findings" />`}
    <${Table} testid="push-files" caption=${t("page.push.files", where)} rows=${plan.files.map((file) => ({ key: file.name, ...file }))} columns=${[
      { key: "name", title: t("page.push.file"), render: (file) => html`<${Verbatim}>${file.name}<//>${file.rewritten && html` <span class="quiet">${t(file.role === "card" ? "page.push.card_below" : "page.push.rewritten")}</span>`}` },
      { key: "role", title: t("page.push.role"), render: (file) => t(`page.push.role.${file.role}`) },
      { key: "size", title: t("drift.column.size"), numeric: true, render: (file) => formatBytes(file.size_bytes) },
    ]} />
    ${plan.left_out.length > 0 && html`<details><summary>${t("page.push.stays", { count: plan.left_out.length })}</summary>
      <ul class="plain-list">${plan.left_out.map((one) => html`<li key=${one.name}><${Verbatim}>${one.name}<//> <span class="quiet">${t(`push.left.${one.reason}`)}</span></li>`)}</ul></details>`}
    <${Field} label=${t("page.push.card")} hint=${t(`page.push.card.${card !== null ? "edited" : plan.card_from}`)}>
      <${TextInput} mono rows=${14} testid="push-card" value=${card ?? plan.card} onchange=${(text) => setCard(text === plan.card ? null : text)} /><//>
    ${card !== null && html`<div class="start-row"><${Button} testid="push-card-reset" onclick=${() => setCard(null)}>${t("page.push.card_reset")}<//></div>`}
    <${Command} text=${job.command.replace(/ --dry-run\b/, "")} label=${t("page.common.command")} />
    <${ErrorBox} error=${error} />
    ${!fresh && html`<p class="amber" role="status">${t("page.push.stale")}</p>`}
    <div class="start-row"><${Button} kind="danger" testid="push-start" disabled=${!fresh} onclick=${push}>${t("page.push.start", where)}<//>
      <span class="quiet">${t("page.push.login")}</span></div>
  </section>`;
}

function Done({ job, pushed }) {
  const address = ADDRESSES.test(pushed.url) ? html`<a href=${pushed.url} target="_blank" rel="noopener noreferrer"><${Verbatim}>${pushed.url}<//></a>` : html`<bdi class="path">${pushed.url}</bdi>`;
  return html`<section class="done-card" data-testid="push-done" aria-label=${t("page.push.done")}>
    <h2><${Icon} name="ok" />${t(pushed.unchanged ? "page.push.unchanged" : "page.push.done")}</h2>
    <p class="lead">${address}</p>
    <p>${t("page.push.compared", { files: pushed.files, size: pushed.size_bytes })}</p>
    ${pushed.removed.length > 0 && html`<p>${t("page.push.removed", { files: pushed.removed.join(", ") })}</p>`}
    <details class="elsewhere"><summary>${t("page.common.command")}</summary><${Command} text=${job.command} /></details>
  </section>`;
}
