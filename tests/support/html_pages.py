"""HTML pages, parsed as a browser does."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text of each card."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.cards, self.head = [], [], ""
        self._is_code = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "article":
            self.cards.append("")
        self._is_code = tag in ("script", "style")

    def handle_data(self, data):
        if self._is_code:
            self._is_code = False
        elif self.cards:
            self.cards[-1] += data
        else:
            self.head += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def rows(self):
        return [int(attributes["id"].removeprefix("row-")) for attributes in self.attributes("article")]
