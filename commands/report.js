"use strict";
const input = document.querySelector("#search");
const found = document.querySelector("#found");
const moments = [...document.querySelectorAll("ol:not(.frames) > li")];
const texts = moments.map((moment) => moment.querySelector(".text").textContent);
const marks = [...document.querySelectorAll(".timeline a")];

const fold = (text) => text.normalize("NFC").toLocaleLowerCase();

// Show a text with the words found in it marked. A letter that changes length in lower case leaves it unmarked.
function show(place, text, words) {
  const folded = fold(text);
  const spans = folded.length === text.length ? words.flatMap((word) => spansOf(folded, word)) : [];
  spans.sort((one, other) => one[0] - other[0]);
  place.replaceChildren();
  let at = 0;
  for (const [begin, end] of spans) {
    if (end <= at) continue;
    const mark = document.createElement("mark");
    mark.textContent = text.slice(Math.max(begin, at), end);
    place.append(text.slice(at, Math.max(begin, at)), mark);
    at = end;
  }
  place.append(text.slice(at));
}

function spansOf(text, word) {
  const spans = [];
  for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
    spans.push([at, at + word.length]);
  }
  return spans;
}

function search() {
  const words = fold(input.value).split(/\s+/).filter(Boolean);
  let count = 0;
  moments.forEach((moment, index) => {
    const time = moment.querySelector("time").textContent;
    const text = fold(texts[index] + " " + time);
    moment.hidden = !words.every((word) => text.includes(word));
    count += !moment.hidden;
    show(moment.querySelector(".text"), texts[index], words);
  });
  // Moments of one time share a mark: the first of them is the one that it leads to.
  const firsts = [...marks.map((mark) => mark.getAttribute("href").split("-")[1] - 1), moments.length];
  marks.forEach((mark, index) => {
    mark.classList.toggle("missed", moments.slice(firsts[index], firsts[index + 1]).every((moment) => moment.hidden));
  });
  found.textContent = words.length ? `${count} of ${moments.length}` : "";
}

// A moment that a link leads to is shown, also if the search had hidden it.
function follow() {
  const moment = moments.find((each) => "#" + each.id === location.hash);
  for (const mark of marks) {
    if (moment && mark.getAttribute("href") === location.hash) mark.setAttribute("aria-current", "true");
    else mark.removeAttribute("aria-current");
  }
  if (moment && moment.hidden) {
    input.value = "";
    search();
    moment.scrollIntoView();
  }
}

if (input) {
  input.form.hidden = false;
  input.form.addEventListener("submit", (event) => event.preventDefault());
  input.addEventListener("input", () => {
    search();
    const list = document.querySelector("ol");
    if (list.getBoundingClientRect().top < 0) list.scrollIntoView();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    input.value = "";
    search();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || document.activeElement === input) return;
    event.preventDefault();
    input.focus();
  });
  // A click on the mark of the current moment changes no address.
  for (const mark of marks) mark.addEventListener("click", () => setTimeout(follow));
  addEventListener("hashchange", follow);
  follow();
}
