"use strict";

// Markdown of an answer as DOM nodes. An answer may be hostile: a document that it was made from can tell a model what
// to write. Three walls: HTML in it is shown as text, what marked makes is sanitised by DOMPurify to the elements that
// Markdown needs, and the page's Content-Security-Policy forbids every script, style and image but the page's own.

const markdown = (() => {
  const TAGS = [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ];
  const POLICY = {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["align", "href", "start"],
    ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
    ALLOW_ARIA_ATTR: false,
    ALLOW_DATA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  };
  // Past this an answer is shown as plain text: parsing it again with each piece would take too long.
  const MOST_CHARACTERS = 200_000;

  const escape = (text) => text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);
  const parser = new marked.Marked({
    gfm: true,
    breaks: true,
    renderer: {
      html: ({ text, block }) => (block ? `<p>${escape(text.trim()).replaceAll("\n", "<br>")}</p>` : escape(text)),
      image: ({ text, href }) => escape(`[image: ${text || href}]`),
      checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
      code: ({ text }) => `<pre><code>${escape(text)}</code></pre>`,
    },
  });

  function finish(fragment) {
    for (const link of fragment.querySelectorAll("a")) {
      if (!link.hasAttribute("href")) continue;
      link.rel = "noopener noreferrer nofollow";
      link.target = "_blank";
      link.title = link.getAttribute("href");
    }
    return fragment;
  }

  /** The nodes of `text`; as plain text where it cannot be parsed. */
  return (text) => {
    try {
      if (text.length > MOST_CHARACTERS) throw new RangeError("too long");
      return finish(DOMPurify.sanitize(parser.parse(text), POLICY));
    } catch {
      const plain = document.createElement("p");
      plain.className = "plain-text";
      plain.textContent = text;
      return plain;
    }
  };
})();
