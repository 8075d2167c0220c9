// Sorts a table by the column whose heading is clicked. The page also works without this script.
for (const table of document.querySelectorAll('table')) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const text = (row, i) => row.cells[i].textContent.trim();
  const absent = (value) => ['', '-', 'n/a'].includes(value);
  heads.forEach((head, i) => {
    const button = document.createElement('button');
    button.title = 'Sort by this column';
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const rows = [...body.rows], values = rows.map((row) => text(row, i));
      const numbers = i > 0 && values.every((t) => absent(t) || !isNaN(parseFloat(t)));
      const before = head.getAttribute('aria-sort');
      const falling = before ? before === 'ascending' : numbers;
      const order = (a, b) =>
        numbers ? parseFloat(a) - parseFloat(b) : a.localeCompare(b, undefined, { numeric: true });
      rows.sort((a, b) => {
        const [x, y] = [text(a, i), text(b, i)];
        return absent(x) - absent(y) || (falling ? -order(x, y) : order(x, y)) || 0;
      });
      heads.forEach((other) => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', falling ? 'descending' : 'ascending');
      body.append(...rows);
    };
  });
}
