// Nothing here is needed to read the page. When something happens at the cloudlet, the page is asked
// for again and what is in it takes the place of what was: the daemon alone knows how things look.
"use strict";
(() => {
  const pace = 1000;
  const live = document.getElementById("live");
  let waiting = false;
  const say = (text) => { live.textContent = text; };
  const renew = async () => {
    waiting = false;
    try {
      const answer = await fetch("/", { cache: "no-store" });
      if (!answer.ok) return;
      const next = new DOMParser().parseFromString(await answer.text(), "text/html");
      const [old, now] = [document.querySelector("main"), next.querySelector("main")];
      if (now && old.innerHTML !== now.innerHTML) old.replaceWith(now);
    } catch { /* The stream tells when the daemon is gone. */ }
  };
  const soon = () => {
    if (waiting || document.hidden) return;
    waiting = true;
    setTimeout(renew, pace);
  };
  const events = new EventSource("/v1/events");
  events.onopen = () => { say("live"); soon(); };
  events.onerror = () => say("not connected: what is shown may be old");
  for (const name of ["vm", "vm-gone", "operation", "receive", "lost"]) events.addEventListener(name, soon);
  document.addEventListener("visibilitychange", soon);
})();
