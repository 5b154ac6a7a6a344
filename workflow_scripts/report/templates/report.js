"use strict";
// The viewer of flipped prompts. Stored text is only ever set as text.
const data = JSON.parse(document.getElementById("answers").textContent);
const pair = document.getElementById("pair"), search = document.getElementById("search");
const which = document.getElementById("which"), cards = document.getElementById("cards"), count = document.getElementById("count");
const MOST = 40;

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function side(name, row) {
  const box = element("div", "");
  box.append(element("h4", row[0] ? "better" : "worse", name + (row[0] ? ": follows" : ": fails")));
  box.append(document.createTextNode(row[1] || "(no answer)"));
  return box;
}

function show() {
  const [task, after, before] = data.pairs[pair.value];
  const words = search.value.toLowerCase();
  cards.replaceChildren();
  let found = 0;
  for (const [key, prompt] of Object.entries(data.prompts[task])) {
    const a = data.answers[task][after][key], b = data.answers[task][before][key];
    if (!a || !b || a[0] === b[0]) continue;
    if (which.value !== "both" && (which.value === "gained") !== (a[0] === 1)) continue;
    if (words && !(key + " " + prompt + " " + a[1] + " " + b[1]).toLowerCase().includes(words)) continue;
    found += 1;
    if (found > MOST) continue;
    const card = element("div", "card");
    card.append(element("div", "soft small", "prompt " + key), element("div", "", prompt));
    const sides = element("div", "sides");
    sides.append(side(after, a), side(before, b));
    card.append(sides);
    cards.append(card);
  }
  count.textContent = found + (found === 1 ? " prompt" : " prompts") + (found > MOST ? ", the first " + MOST + " are shown" : "");
}

data.pairs.forEach(([task, after, before], index) => {
  const option = element("option", "", after + " against " + before + " (" + task + ")");
  option.value = index;
  pair.append(option);
});
for (const one of [pair, search, which]) one.addEventListener("input", show);
if (data.pairs.length) show();
