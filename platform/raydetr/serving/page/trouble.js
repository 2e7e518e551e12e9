// Error messages with the next step for the user, and the token form.

let timer;
function hideError() {
  clearInterval(timer);
  find("message").hidden = true;
}

// Show an error. Transient errors are retried automatically, a few times.
function showError(error, again, retry = 0) {
  hideError();
  if (error.status === 401) return showTokenForm(error);
  const [title, advice] = explain(error.status);
  const box = find("message");
  const action = make("button", { className: "button", type: "button" });
  box.replaceChildren(make("h2", { textContent: title }), make("p", { textContent: advice }));
  if (error.message) {
    const id = error.id ? ` (request ${error.id})` : "";
    box.append(make("p", { className: "note", textContent: `Message of the server: ${error.message}${id}` }));
  }
  action.textContent = "Try again";
  action.onclick = () => again(0);
  const { image } = state;
  if ([408, 413].includes(error.status) && image && image.note !== "sent as a smaller copy") {
    action.textContent = "Send a smaller copy";
    action.onclick = async () => {
      const smaller = await encodeSmaller(image);
      if (state.image === image) useImage(smaller);
    };
  } else if (error.status === 409 && state.mode !== "boxes") {
    action.textContent = "Show boxes";
    action.onclick = () => setMode("boxes");
  } else if ((error.status === 429 || error.status === 503) && retry < MAX_RETRIES) {
    let left = Math.max(1, error.wait ?? 2 ** retry);
    const count = () => (action.textContent = `Try now (automatic retry in ${left} s)`);
    count();
    timer = setInterval(() => {
      left -= 1;
      if (left > 0) count();
      else again(retry + 1);
    }, 1000);
  }
  if (![400, 415].includes(error.status)) box.append(action);
  if (!state.answers[state.mode]) find("slider").hidden = true;
  box.hidden = false;
  box.scrollIntoView({ block: "nearest" });
}

function showTokenForm(error) {
  const known = sessionStorage.getItem(TOKEN);
  needsToken = true;
  find("token-form").hidden = false;
  find("token-text").replaceChildren(
    make("strong", { textContent: known ? "The server does not accept this token." : "This server requires a token." }),
    known && error.id ? ` Enter another one (request ${error.id}).` : known ? " Enter another one." : " Ask its operator for one.",
  );
  find("token").setAttribute("aria-invalid", Boolean(known));
  find("token").focus();
}

function hideTokenForm() {
  find("token-form").hidden = true;
  if (sessionStorage.getItem(TOKEN)) needsToken = true;
}

find("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // Remove characters that a header cannot hold, e.g. invisible ones of a pasted token.
  sessionStorage.setItem(TOKEN, find("token").value.replace(/[^\x21-\x7e]/g, ""));
  if (!models) loadModels().then(() => models && detect());
  else detect();
});
