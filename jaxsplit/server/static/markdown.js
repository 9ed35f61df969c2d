// Markdown as DOM nodes. Text goes into text nodes only; HTML in it is text like any other.
//
// Every step is linear in the text: models repeat themselves, and "[[[[..." must not hang a page.

const MAX_BLOCKS = 10; // quotes and lists in each other
const MAX_OPEN = 32; // delimiters that wait for their other half

/** An element: `h("a", {href}, "text", node)`. */
export function h(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  for (const child of children) node.append(child);
  return node;
}

/** Shows a text that grows: only its last blocks are parsed again, and only changes are drawn. */
export class MarkdownView {
  #root;
  #final = 0; // blocks that more text leaves as they are
  #offset = 0; // where the text after them begins

  constructor(root) {
    this.#root = root;
  }

  /** Shows `text`, which begins with what was shown before. */
  update(text) {
    const root = this.#root;
    const lines = split(text.slice(this.#offset));
    const blocks = parse(lines);
    blocks.forEach(({ node }, i) => {
      const old = root.childNodes[this.#final + i];
      if (old) morph(old, node);
      else root.append(node);
    });
    while (root.childNodes.length > this.#final + blocks.length) root.lastChild.remove();
    // An unfinished line may yet turn out to continue the block before it.
    if (blocks.length > 2) {
      const { line } = blocks.at(-2);
      for (let i = 0; i < line; i++) this.#offset += lines[i].length + 1;
      this.#final += blocks.length - 2;
    }
  }
}

/** Changes `old` into `made`, and leaves alone what is the same: selections and scrolls survive. */
function morph(old, made) {
  if (old.nodeType === Node.TEXT_NODE && made.nodeType === Node.TEXT_NODE) {
    if (made.data.startsWith(old.data)) {
      if (made.length > old.length) old.appendData(made.data.slice(old.length));
    } else {
      old.data = made.data;
    }
  } else if (old.cloneNode().isEqualNode(made.cloneNode())) {
    const from = [...old.childNodes];
    const to = [...made.childNodes];
    to.forEach((child, i) => (from[i] ? morph(from[i], child) : old.append(child)));
    from.slice(to.length).forEach((child) => child.remove());
  } else {
    old.replaceWith(made);
  }
}

// Blocks

const split = (text) => text.split("\n");

/** The blocks of lines: each with its node, and the line where it begins. */
function parse(lines, depth = 0) {
  lines = lines.map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line));
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const found = opening(lines, i, depth);
    const [node, next] = found
      ? found.kind.read(lines, i, found.match, depth)
      : readParagraph(lines, i, depth);
    blocks.push({ node, line: i });
    i = next;
  }
  return blocks;
}

/** Kinds of blocks: what the first line looks like, and `read`, which returns a node and the line
 * after it. `interrupts`: whether it ends a paragraph. */
const KINDS = [
  { opens: (line) => /^ *(`{3,}|~{3,})(?![`~])([^`]*)$/.exec(line), read: readFence },
  { opens: (line) => /^ {0,3}(#{1,6})(?:[ \t](.*))?$/.exec(line), read: readHeading },
  { opens: isRule, read: (lines, i) => [h("hr"), i + 1] },
  { opens: (line) => /^ {0,3}>/.exec(line), read: readQuote, nests: true },
  { opens: listMarker, read: readList, nests: true, interrupts: (m) => m[4] && /^1?\D$/.test(m[2]) },
  { opens: tableHeader, read: readTable },
];

function opening(lines, i, depth) {
  for (const kind of KINDS) {
    if (kind.nests && depth >= MAX_BLOCKS) continue;
    const match = kind.opens(lines[i], lines[i + 1]);
    if (match) return { kind, match };
  }
  return null;
}

function interrupts(lines, i, depth) {
  const found = opening(lines, i, depth);
  return found && (found.kind.interrupts?.(found.match) ?? true);
}

function readParagraph(lines, start, depth) {
  let i = start + 1;
  while (i < lines.length && lines[i].trim() && !interrupts(lines, i, depth)) i++;
  const text = lines.slice(start, i).map((line) => line.trim()).join("\n");
  return [inline(text, h("p")), i];
}

function readFence(lines, start, [, fence, info]) {
  let i = start + 1;
  const closes = (line) => line.startsWith(fence) && line === fence[0].repeat(line.length);
  while (i < lines.length && !closes(lines[i].trim())) i++;
  const width = indent(lines[start]);
  const text = lines.slice(start + 1, i).map((line) => dedent(line, width)).join("\n");
  return [codeBlock(text, info.trim().split(/[\s{]/, 1)[0]), i + 1];
}

/** A block of code, with its language and a button to copy it. */
export function codeBlock(text, language) {
  const copy = h("button", { className: "plain", textContent: "Copy" });
  copy.dataset.do = "copy-code";
  return h(
    "figure",
    { className: "code" },
    h("figcaption", {}, h("span", { textContent: language }), copy),
    h("pre", { dir: "ltr", tabIndex: 0 }, withMarks(text, h("code"))),
  );
}

function readHeading(lines, i, [, marks, text]) {
  // The page has the first two levels.
  const tag = `h${Math.min(marks.length + 2, 6)}`;
  return [inline((text ?? "").trim(), h(tag)), i + 1];
}

function isRule(line) {
  return /^(?:-{3,}|\*{3,}|_{3,})$/.test(line.replace(/[ \t]/g, ""));
}

function readQuote(lines, start, _, depth) {
  let i = start;
  const inner = [];
  for (; i < lines.length && /^ {0,3}>/.test(lines[i]); i++) {
    inner.push(lines[i].trimStart().slice(1).replace(/^ /, ""));
  }
  return [h("blockquote", {}, ...nodes(inner, depth + 1)), i];
}

function listMarker(line) {
  return isRule(line) ? null : /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)|$)(.*)/.exec(line);
}

function readList(lines, start, first, depth) {
  const kind = first[2].at(-1);
  const list = h(first[2].length > 1 ? "ol" : "ul");
  if (list.tagName === "OL" && parseInt(first[2]) !== 1) list.start = parseInt(first[2]);
  let i = start;
  while (i < lines.length) {
    const marker = listMarker(lines[i]);
    if (!marker || marker[2].at(-1) !== kind) break;
    const outer = indent(marker[1]);
    // Models indent what belongs to an item by anything from two columns on.
    let inner = outer + marker[2].length + Math.min(indent(marker[3] ?? " "), 4);
    let known = false;
    const item = [marker[4].replace(/^\[( |x)\] /i, (_, x) => (x === " " ? "☐ " : "☑ "))];
    for (i++; i < lines.length; i++) {
      const line = lines[i];
      const width = indent(line);
      if (!line.trim()) {
        item.push("");
      } else if (width >= Math.min(inner, outer + 2)) {
        if (!known) [known, inner] = [true, Math.min(inner, width)];
        item.push(dedent(line, inner));
      } else if (item.at(-1) !== "" && !opening(lines, i, depth)) {
        item.push(line);
      } else {
        break;
      }
    }
    list.append(h("li", {}, ...nodes(item, depth + 1)));
  }
  return [list, i];
}

function tableHeader(line, next) {
  if (!line.includes("|") || !next?.includes("|")) return null;
  const aligned = cells(next);
  if (!aligned.every((cell) => /^:?-+:?$/.test(cell))) return null;
  const names = cells(line);
  return names.length === aligned.length ? { names, aligned } : null;
}

function readTable(lines, start, { names, aligned }, depth) {
  const sides = aligned.map((cell) => (cell.endsWith(":") ? (cell[0] === ":" ? "center" : "end") : ""));
  const row = (tag, texts) => {
    const tr = h("tr");
    // More cells than columns: the last one takes what is left.
    if (texts.length > names.length) texts.push(texts.splice(names.length - 1).join(" | "));
    texts.forEach((text, column) => {
      tr.append(inline(text, h(tag, { className: sides[column] }), { cell: true }));
    });
    return tr;
  };
  const body = h("tbody");
  let i = start + 2;
  for (; i < lines.length && lines[i].includes("|") && !interrupts(lines, i, depth); i++) {
    body.append(row("td", cells(lines[i])));
  }
  const table = h("table", {}, h("thead", {}, row("th", names)), body);
  // Not all browsers let the keyboard scroll what has no tabindex.
  return [h("div", { className: "wide", tabIndex: 0 }, table), i];
}

function cells(line) {
  let text = line.trim();
  if (text.startsWith("|")) text = text.slice(1);
  if (text.endsWith("|") && !text.endsWith("\\|")) text = text.slice(0, -1);
  const found = [""];
  for (const [piece] of text.matchAll(/\\.|`+[^`]*`+|[^|`\\]+|./g)) {
    if (piece === "|") found.push("");
    else found[found.length - 1] += piece === "\\|" ? "|" : piece;
  }
  return found.map((cell) => cell.trim());
}

const nodes = (lines, depth) => parse(lines, depth).map(({ node }) => node);

/** Columns of white space at the beginning of a line. */
function indent(line) {
  let width = 0;
  for (const c of line) {
    if (c === " ") width++;
    else if (c === "\t") width += 4;
    else break;
  }
  return width;
}

function dedent(line, width) {
  let i = 0;
  for (let seen = 0; seen < width && (line[i] === " " || line[i] === "\t"); i++) {
    seen += line[i] === "\t" ? 4 : 1;
  }
  return line.slice(i);
}

// Inside of blocks

const SPECIAL = /[\\`*_~[\]!<$\n]|https?:\/\//g;
const TARGET = /\(\s{0,9}<?([^\s<>()]{1,4000}(?:\([^\s()]{0,400}\)[^\s()<>]{0,400}){0,9})>?(?:\s{1,9}(?:"[^"]{0,400}"|'[^']{0,400}'))?\s{0,9}\)/y;
const URL_TEXT = /https?:\/\/[^\s<>"`\\|]+/y;
const WORD = /[\p{L}\p{N}]/u;
const TAGS = { "*": ["em", "strong"], _: ["em", "strong"], "~": ["", "s"] };

/** Appends a text with its emphasis, code and links to `parent`; returns that. */
export function inline(text, parent, { cell = false } = {}) {
  const out = []; // texts and nodes
  const open = []; // delimiters: their mark, and where in `out` it is
  const missing = new Set(); // what does not occur any more
  let at = 0;

  /** Where `mark` comes next, from `from` on; -1: nowhere. */
  function find(mark, from) {
    if (missing.has(mark)) return -1;
    let found = text.indexOf(mark, from);
    if (mark[0] === "`") {
      // A run of exactly as many
      while (found >= 0 && text[found + mark.length] === "`") {
        let end = found + mark.length;
        while (text[end] === "`") end++;
        found = text.indexOf(mark, end);
      }
    }
    if (found < 0) missing.add(mark);
    return found;
  }

  function opens(mark) {
    if (open.length === MAX_OPEN) open.shift();
    open.push({ mark, at: out.length });
    out.push(mark);
  }

  /** Puts all that follows the delimiter `open[index]` into an element. */
  function wrap(index, node) {
    const { at: from } = open[index];
    open.length = index;
    appendAll(node, out.splice(from).slice(1));
    out.push(node);
  }

  /** Code or formulas from `at` up to `mark`, verbatim. */
  function verbatim(start, mark, className = "") {
    const end = find(mark, at + start.length);
    if (end < 0) return false;
    let body = text.slice(at + start.length, end).replaceAll("\n", " ");
    if (/^ .* $/.test(body) && body.trim()) body = body.slice(1, -1);
    out.push(withMarks(body, h("code", { className })));
    at = end + mark.length;
    return true;
  }

  function emphasis(char) {
    let end = at;
    while (text[end] === char) end++;
    let left = end - at;
    const [before, after] = [text[at - 1] ?? " ", text[end] ?? " "];
    const inWord = char === "_";
    const canOpen = /\S/.test(after) && !(inWord && WORD.test(before));
    const canClose = /\S/.test(before) && !(inWord && WORD.test(after));
    at = end;
    if (left > 3 || (char === "~" && left !== 2)) {
      out.push(char.repeat(left));
      return;
    }
    while (canClose && left) {
      const same = (d) => d.mark[0] === char;
      let index = open.findLastIndex((d) => same(d) && d.mark.length === left);
      if (index < 0) index = open.findLastIndex((d) => same(d) && d.mark.length < left);
      if (index < 0) break;
      const { length } = open[index].mark;
      wrap(index, h(TAGS[char][length - 1]));
      left -= length;
    }
    if (left && canOpen) {
      if (left > 1) opens(char.repeat(2));
      if (left !== 2) opens(char);
    } else if (left) {
      out.push(char.repeat(left));
    }
  }

  function bracket() {
    const index = open.findLastIndex((d) => d.mark.endsWith("["));
    TARGET.lastIndex = at + 1;
    const match = index >= 0 && TARGET.exec(text);
    const node = match && link(match[1]);
    if (node) {
      at = TARGET.lastIndex;
      wrap(index, node);
      node.querySelectorAll("a").forEach((inner) => inner.replaceWith(...inner.childNodes));
      if (!node.hasChildNodes()) node.append(match[1]);
      return;
    }
    if (index >= 0) open.splice(index, 1);
    out.push("]");
    at++;
  }

  function bareUrl() {
    URL_TEXT.lastIndex = at;
    let [url = ""] = URL_TEXT.exec(text) ?? [];
    let extra = [...url].reduce((n, c) => n + (c === ")") - (c === "("), 0);
    let end = url.length;
    while (/[.,;:!?'*_~)\]]/.test(url[end - 1] ?? "")) {
      if (url[end - 1] === ")" && extra-- <= 0) break;
      end--;
    }
    url = url.slice(0, end);
    const node = link(url);
    const shown = url || text.slice(at, at + 4);
    if (node) node.append(url);
    out.push(node ?? shown);
    at += shown.length;
  }

  for (;;) {
    SPECIAL.lastIndex = at;
    const match = SPECIAL.exec(text);
    if (!match) break;
    if (match.index > at) out.push(text.slice(at, match.index));
    at = match.index;
    const char = text[at];
    const next = text[at + 1];
    if (char === "\n") {
      out.push(h("br"));
      at++;
    } else if (char === "\\") {
      if (next === "(" && verbatim("\\(", "\\)", "math")) continue;
      if (next === "[" && verbatim("\\[", "\\]", "math")) continue;
      const escapes = /[!-/:-@[-`{-~]/.test(next ?? "");
      out.push(escapes ? next : char);
      at += escapes ? 2 : 1;
    } else if (char === "`") {
      let end = at;
      while (text[end] === "`") end++;
      const run = text.slice(at, end);
      if (verbatim(run, run)) continue;
      out.push(run);
      at = end;
    } else if (char in TAGS) {
      emphasis(char);
    } else if (char === "[" || (char === "!" && next === "[")) {
      const mark = char === "!" ? "![" : "["; // images of other hosts are links
      opens(mark);
      at += mark.length;
    } else if (char === "]") {
      bracket();
    } else if (char === "h") {
      bareUrl();
    } else if (char === "$" && next === "$" && verbatim("$$", "$$", "math")) {
      continue;
    } else if (cell && /^<br ?\/?>/i.test(text.slice(at, at + 6))) {
      out.push(h("br"));
      at = text.indexOf(">", at) + 1;
    } else {
      out.push(char);
      at++;
    }
  }
  out.push(text.slice(at));
  return appendAll(parent, out);
}

/** A link without text; null: its address is none of the web. */
function link(address) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  const { href } = new URL(address);
  return h("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" });
}

/** Appends texts and nodes; adjacent texts become one. */
function appendAll(parent, pieces) {
  let text = "";
  for (const piece of pieces) {
    if (typeof piece === "string") {
      text += piece;
      continue;
    }
    if (text) parent.append(text);
    parent.append(piece);
    text = "";
  }
  if (text) parent.append(text);
  return parent;
}

/** Appends code, in which characters that reorder others are shown and have no effect. */
function withMarks(text, parent) {
  for (const [i, piece] of text.split(/([\u202a-\u202e\u2066-\u2069])/).entries()) {
    if (i % 2) {
      const mark = h("bdi", { className: "control" }, piece);
      mark.dataset.code = `U+${piece.charCodeAt(0).toString(16).toUpperCase()}`;
      parent.append(mark);
    } else if (piece) {
      parent.append(piece);
    }
  }
  return parent;
}
