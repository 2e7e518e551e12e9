// What went wrong, what can be done about it, and the token.

let timer;
function quiet() {
  clearInterval(timer);
  find("message").hidden = true;
}

// Says what went wrong; what passes by itself is tried again by itself, a few times.
function complain(error, again, repeat = 0) {
  quiet();
  if (error.status === 401) return askForToken(error);
  const [title, advice] = explain(error.status);
  const box = find("message");
  const action = make("button", { className: "button", type: "button" });
  box.replaceChildren(make("h2", { textContent: title }), make("p", { textContent: advice }));
  if (error.message) {
    const id = error.id ? ` (request ${error.id})` : "";
    box.append(make("p", { className: "note", textContent: `The server says: ${error.message}${id}` }));
  }
  action.textContent = "Try again";
  action.onclick = () => again(0);
  const { picture } = state;
  if ([408, 413].includes(error.status) && picture && picture.note !== "sent as a smaller copy") {
    action.textContent = "Send a smaller copy";
    action.onclick = async () => {
      const copied = await smaller(picture);
      if (state.picture === picture) take(copied);
    };
  } else if (error.status === 409 && state.mode !== "boxes") {
    action.textContent = "Show boxes";
    action.onclick = () => setMode("boxes");
  } else if ((error.status === 429 || error.status === 503) && repeat < REPEATS) {
    let left = Math.max(1, error.wait ?? 2 ** repeat);
    const count = () => (action.textContent = `Try now (by itself in ${left} s)`);
    count();
    timer = setInterval(() => {
      left -= 1;
      if (left > 0) count();
      else again(repeat + 1);
    }, 1000);
  }
  if (![400, 415].includes(error.status)) box.append(action);
  if (!state.answers[state.mode]) find("slider").hidden = true;
  box.hidden = false;
  box.scrollIntoView({ block: "nearest" });
}

function askForToken(error) {
  const known = sessionStorage.getItem(TOKEN);
  asksForToken = true;
  find("token-form").hidden = false;
  find("token-text").replaceChildren(
    make("strong", { textContent: known ? "The server does not accept this token." : "This server asks for a token." }),
    known && error.id ? ` Enter another one (request ${error.id}).` : known ? " Enter another one." : " Whoever runs it gives you one.",
  );
  find("token").setAttribute("aria-invalid", Boolean(known));
  find("token").focus();
}

function tokenWorks() {
  find("token-form").hidden = true;
  if (sessionStorage.getItem(TOKEN)) asksForToken = true;
}

find("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // What no header can have would never be accepted.
  sessionStorage.setItem(TOKEN, find("token").value.replace(/[^\x21-\x7e]/g, ""));
  if (!models) askModels().then(() => models && look());
  else look();
});
