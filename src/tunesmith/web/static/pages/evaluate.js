// Did the tuning help, and what did it break: an evaluation, shown as the report shows it.
import { amend, currentLang, ended, html, startJob, t, useJob, useState } from "../core.js";
import { Button, Command, DownloadButton, ErrorBox, Field, TextInput, Toggle } from "../ui.js";
import { Running } from "./compare.js";
import { useKept } from "./variants.js";

/** The form and, once there is one, the evaluation of the chosen variants. */
export function Evaluate({ run, base, chosen, id }) {
  const [form, setForm] = useKept(`evaluate.${run}`, { data: "", general: true });
  const [error, setError] = useState(null);
  const job = useJob(id);
  const set = (part) => setForm((before) => ({ ...before, ...part }));
  const start = () =>
    startJob("evaluate", { run, base: base || null, variants: chosen, data: form.data.trim() || null, general: form.general }).then(
      (made) => { setError(null); amend({ evaluation: made.id, tab: "effect" }); },
      setError,
    );
  return html`
    <p class="intro">${t("page.compare.effect.about")}</p>
    <div class="batch-form">
      <${Field} label=${t("page.compare.effect.data")} hint=${t("page.compare.effect.data.hint")}><${TextInput} mono value=${form.data} placeholder="rows.jsonl" onchange=${(data) => set({ data })} testid="evaluate-data" /><//>
      <${Field} label=${t("page.compare.effect.general")} hint=${t("page.compare.effect.general.hint")}><${Toggle} value=${form.general} onchange=${(general) => set({ general })} testid="evaluate-general" /><//>
      <${Button} kind="primary" testid="evaluate-start" disabled=${chosen.length < 2 || (job && !ended(job))} onclick=${start}>${t("page.compare.effect.start")}<//>
    </div>
    <${ErrorBox} error=${error} />
    ${job && html`<${Shown} job=${job} />`}`;
}

function Shown({ job }) {
  if (job.lost) return html`<p class="quiet">${t("page.job.lost")}</p>`;
  if (job.state === "failed") return html`<${ErrorBox} error=${job.error} />`;
  if (job.state === "cancelled") return html`<p class="note" role="status">${t("page.common.job_cancelled")}</p>`;
  if (!ended(job)) return html`<${Running} job=${job} testid="evaluate-progress" stopid="evaluate-cancel" />`;
  const path = `jobs/${job.id}/download`;
  return html`<section class="report-done" data-testid="evaluate-done" aria-label=${t("page.compare.effect.done")}>
    <div class="batch-head"><h2>${t("page.compare.effect.done")}</h2>
      <div class="downloads">${["html", "md", "json"].map((format) => html`<${DownloadButton} key=${format} path=${path} query=${{ format }} filename=${`evaluation.${format}`} testid=${`evaluate-${format}`}>${format.toUpperCase()}<//>`)}</div></div>
    <iframe class="report-frame" sandbox="allow-scripts" src=${`/api/v1/${path}?format=html&lang=${currentLang()}&theme=${document.documentElement.dataset.theme ?? "auto"}`} title=${t("page.compare.effect.done")} data-testid="evaluate-frame"></iframe>
    <${Command} text=${job.command} label=${t("page.common.command")} />
  </section>`;
}
