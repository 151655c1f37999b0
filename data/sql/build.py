"""Text to SQL over one small shop: remakes shop.sql, train.jsonl and eval.jsonl in seconds.

    python data/sql/build.py

A *form* is a question with gaps, worded in three ways, and its query. The forms in `UNSEEN` occur
in eval.jsonl only. Of the other forms, no combination of values is in both files, in any wording.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sqlite3
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRAIN, SEEN_ROWS, UNSEEN_ROWS = 4096, 350, 150
MOST = 80  # combinations of values for a form
SCHEMA = """\
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, joined DATE);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers(id),
    ordered DATE, status TEXT);
CREATE TABLE items (order_id INTEGER REFERENCES orders(id),
    product_id INTEGER REFERENCES products(id), quantity INTEGER);
"""
SYSTEM = (
    "Write one SQLite query that answers the question. Reply with the query alone.\n\n"
    f"{SCHEMA}-- orders.status is 'paid', 'shipped', 'returned' or 'cancelled'; dates are "
    "'YYYY-MM-DD'"
)
CITIES = ["Lisbon", "Oslo", "Vienna", "Dublin", "Prague", "Turin", "Ghent", "Malmo", "Porto",
          "Bergen", "Graz", "Cork"]  # fmt: skip
CATEGORIES = ["lamps", "chairs", "tables", "rugs", "mugs", "clocks", "sofas", "plants"]
STATUSES = ["paid", "shipped", "returned", "cancelled"]
FIRST = ["Ana", "Ben", "Carla", "David", "Elif", "Finn", "Greta", "Hugo", "Ines", "Jonas"]
LAST = ["Weber", "Silva", "Novak", "Berg", "Rossi", "Kelly"]
WORDS = ["Alba", "Birch", "Coral", "Delta", "Ember", "Fjord"]
CUSTOMERS = [f"{first} {last}" for first, last in itertools.product(FIRST, LAST)]
PRODUCTS = [f"{word} {category[:-1].title()}" for category in CATEGORIES for word in WORDS]

# What may stand in a gap.
VALUES: dict[str, list[Any]] = {
    "city": CITIES,
    "category": CATEGORIES,
    "status": STATUSES,
    "customer": CUSTOMERS,
    "product": PRODUCTS,
    "price": [*range(10, 200, 5)],
    "stock": [*range(5, 100, 5)],
    "n": [*range(2, 16)],
    "year": [2021, 2022, 2023, 2024],
    "month": [f"{year}-{month:02}" for year in (2023, 2024) for month in range(1, 13)],
    "day": [str(date(2023, 1, 5) + timedelta(days=11 * i)) for i in range(60)],
    "letter": list("ABCDEFGHIJ"),
    "number": [*range(1, 181)],
}

# Three wordings and the query, which may take several lines. It says ORDER BY where the question
# asks for an order.
FORMS = """
How many customers live in {city}?
Count the customers from {city}.
What is the number of customers in {city}?
SELECT COUNT(*) FROM customers WHERE city = '{city}'

List the names of all customers in {city}.
Which customers live in {city}? Give their names.
Show the names of the customers from {city}.
SELECT name FROM customers WHERE city = '{city}'

How many products are in the category {category}?
Count the {category} that we sell.
What is the number of products in {category}?
SELECT COUNT(*) FROM products WHERE category = '{category}'

What does the {product} cost?
Give the price of the {product}.
How much is the {product}?
SELECT price FROM products WHERE name = '{product}'

How many units of the {product} are in stock?
What is the stock of the {product}?
Show how many {product} we have in stock.
SELECT stock FROM products WHERE name = '{product}'

List the names of products that cost more than {price}.
Which products have a price above {price}? Give their names.
Show the names of all products more expensive than {price}.
SELECT name FROM products WHERE price > {price}

List the names of {category} that cost less than {price}.
Which {category} have a price below {price}? Give their names.
Show the names of all {category} cheaper than {price}.
SELECT name FROM products WHERE category = '{category}' AND price < {price}

How many products have fewer than {stock} units in stock?
Count the products with a stock below {stock}.
What is the number of products with less than {stock} in stock?
SELECT COUNT(*) FROM products WHERE stock < {stock}

What is the average price of {category}?
Compute the mean price of products in the category {category}.
How much do {category} cost on average?
SELECT AVG(price) FROM products WHERE category = '{category}'

What is the price of the most expensive product in {category}?
Give the highest price among {category}.
What do the most expensive {category} cost? Give the maximum price.
SELECT MAX(price) FROM products WHERE category = '{category}'

What is the lowest price among products with more than {stock} units in stock?
Give the minimum price of products whose stock is above {stock}.
Of the products with a stock above {stock}, what is the cheapest price?
SELECT MIN(price) FROM products WHERE stock > {stock}

Give the names of the {n} most expensive products, most expensive first.
List the names of the top {n} products by price, highest price first.
Which {n} products cost the most? Give their names, highest price first.
SELECT name FROM products ORDER BY price DESC LIMIT {n}

Give the names of the {n} cheapest {category}, cheapest first.
List the names of the {n} {category} with the lowest price, lowest first.
Which {n} {category} cost the least? Give their names, lowest price first.
SELECT name FROM products WHERE category = '{category}' ORDER BY price LIMIT {n}

How many orders are {status}?
Count the orders with status {status}.
What is the number of {status} orders?
SELECT COUNT(*) FROM orders WHERE status = '{status}'

How many orders were placed on {day}?
Count the orders from {day}.
What is the number of orders on {day}?
SELECT COUNT(*) FROM orders WHERE ordered = '{day}'

How many orders were placed after {day}?
Count the orders that came in after {day}.
What is the number of orders later than {day}?
SELECT COUNT(*) FROM orders WHERE ordered > '{day}'

List the ids of {status} orders placed before {day}.
Which {status} orders were placed before {day}? Give their ids.
Show the ids of orders before {day} with status {status}.
SELECT id FROM orders WHERE status = '{status}' AND ordered < '{day}'

What is the status of order {number}?
Give the status of the order with id {number}.
Which status does order {number} have?
SELECT status FROM orders WHERE id = {number}

On which date was order {number} placed?
Give the date of the order with id {number}.
When was order {number} placed?
SELECT ordered FROM orders WHERE id = {number}

Who placed order {number}? Give the customer's name.
Give the name of the customer of order {number}.
What is the name of the customer who placed order {number}?
SELECT c.name FROM customers c JOIN orders o ON o.customer_id = c.id WHERE o.id = {number}

In which city does {customer} live?
Give the city of {customer}.
What is the home city of {customer}?
SELECT city FROM customers WHERE name = '{customer}'

How many orders did {customer} place?
Count the orders of {customer}.
What is the number of orders by {customer}?
SELECT COUNT(*) FROM orders o JOIN customers c ON c.id = o.customer_id WHERE c.name = '{customer}'

How many {status} orders does {customer} have?
Count the {status} orders of {customer}.
What is the number of orders by {customer} that are {status}?
SELECT COUNT(*) FROM orders o JOIN customers c ON c.id = o.customer_id
    WHERE c.name = '{customer}' AND o.status = '{status}'

On which dates did {customer} order something?
List the dates of the orders of {customer}.
Show when {customer} placed orders: the dates.
SELECT o.ordered FROM orders o JOIN customers c ON c.id = o.customer_id WHERE c.name = '{customer}'

How many customers joined in {year}?
Count the customers that joined in the year {year}.
What is the number of customers who joined in {year}?
SELECT COUNT(*) FROM customers WHERE joined LIKE '{year}%'

List the names of customers who joined after {day}.
Which customers joined after {day}? Give their names.
Show the names of customers that joined later than {day}.
SELECT name FROM customers WHERE joined > '{day}'

List the names of customers whose name starts with {letter}.
Which customers have a name that begins with {letter}? Give their names.
Show the names of customers starting with the letter {letter}.
SELECT name FROM customers WHERE name LIKE '{letter}%'

How many products cost between {price} and {price2}?
Count the products with a price from {price} to {price2}.
What is the number of products priced between {price} and {price2}?
SELECT COUNT(*) FROM products WHERE price BETWEEN {price} AND {price2}

How many units of the {product} were sold?
What is the total quantity of the {product} over all orders?
Sum the ordered quantities of the {product}.
SELECT SUM(i.quantity) FROM items i JOIN products p ON p.id = i.product_id
    WHERE p.name = '{product}'

List the names of the products in order {number}.
Which products does order {number} contain? Give their names.
Show the names of the products of order {number}.
SELECT p.name FROM products p JOIN items i ON i.product_id = p.id WHERE i.order_id = {number}

How many units does order {number} contain in total?
What is the total quantity of order {number}?
Sum the quantities of the items in order {number}.
SELECT SUM(quantity) FROM items WHERE order_id = {number}

What is the total value of order {number}?
Compute the sum of price times quantity for order {number}.
How much does order {number} cost in total?
SELECT SUM(p.price * i.quantity) FROM items i JOIN products p ON p.id = i.product_id
    WHERE i.order_id = {number}

Which cities have at least {n} customers?
List the cities where {n} or more customers live.
Show the cities with {n} customers or more.
SELECT city FROM customers GROUP BY city HAVING COUNT(*) >= {n}

For each category, how many products cost more than {price}?
Count the products above a price of {price} in each category. Give category and count.
Show every category with its number of products that cost more than {price}.
SELECT category, COUNT(*) FROM products WHERE price > {price} GROUP BY category

How many {status} orders came from customers in {city}?
Count the {status} orders of customers living in {city}.
What is the number of {status} orders from {city}?
SELECT COUNT(*) FROM orders o JOIN customers c ON c.id = o.customer_id
    WHERE o.status = '{status}' AND c.city = '{city}'

How many orders were placed in {month}?
Count the orders of the month {month}.
What is the number of orders in {month}?
SELECT COUNT(*) FROM orders WHERE ordered LIKE '{month}%'

What is the total stock of {category}?
Sum the stock of all products in the category {category}.
How many {category} are in stock altogether?
SELECT SUM(stock) FROM products WHERE category = '{category}'

List the names and prices of products with fewer than {stock} units in stock.
Which products have a stock below {stock}? Give name and price.
Show name and price of all products with less than {stock} in stock.
SELECT name, price FROM products WHERE stock < {stock}

Which products have never been ordered and cost more than {price}? Give their names.
List the names of products above {price} that are in no order.
Show the names of products that cost more than {price} and were never ordered.
SELECT name FROM products WHERE price > {price} AND id NOT IN (SELECT product_id FROM items)

Which customers in {city} have placed no order? Give their names.
List the names of customers from {city} without any order.
Show the names of the customers in {city} who never ordered.
SELECT name FROM customers WHERE city = '{city}' AND id NOT IN (SELECT customer_id FROM orders)

List the names of the customers in {city} by the date they joined, earliest first.
Show the names of customers from {city}, those who joined first on top.
Give the names of customers in {city} ordered by when they joined, oldest first.
SELECT name FROM customers WHERE city = '{city}' ORDER BY joined

Which statuses do the orders of {customer} have? List each once.
List the different statuses among the orders of {customer}.
Show the distinct order statuses of {customer}.
SELECT DISTINCT o.status FROM orders o JOIN customers c ON c.id = o.customer_id
    WHERE c.name = '{customer}'
"""

# The same, for evaluation only.
UNSEEN = """
How many customers do not live in {city}?
Count the customers outside {city}.
What is the number of customers whose city is not {city}?
SELECT COUNT(*) FROM customers WHERE city <> '{city}'

What is the average stock of products that cost more than {price}?
Compute the mean stock of products above a price of {price}.
How many units are in stock on average for products more expensive than {price}?
SELECT AVG(stock) FROM products WHERE price > {price}

How many different products does order {number} contain?
Count the distinct products in order {number}.
What is the number of different products in order {number}?
SELECT COUNT(DISTINCT product_id) FROM items WHERE order_id = {number}

List the names of customers who joined before {day} and live in {city}.
Which customers in {city} joined before {day}? Give their names.
Show the names of customers from {city} that joined earlier than {day}.
SELECT name FROM customers WHERE city = '{city}' AND joined < '{day}'

For each city, how many customers joined after {day}?
Count the customers that joined after {day} in each city. Give city and count.
Show every city with its number of customers who joined after {day}.
SELECT city, COUNT(*) FROM customers WHERE joined > '{day}' GROUP BY city

Give the names of the {n} products with the most units in stock, most first.
List the names of the top {n} products by stock, highest stock first.
Which {n} products have the largest stock? Give their names, largest first.
SELECT name FROM products ORDER BY stock DESC LIMIT {n}

When did {customer} join?
Give the date on which {customer} joined.
What is the joining date of {customer}?
SELECT joined FROM customers WHERE name = '{customer}'

Which customers bought the {product}? List each name once.
List the different names of customers who ordered the {product}.
Show the distinct names of customers with the {product} in an order.
SELECT DISTINCT c.name FROM customers c JOIN orders o ON o.customer_id = c.id
    JOIN items i ON i.order_id = o.id JOIN products p ON p.id = i.product_id
    WHERE p.name = '{product}'
"""


def forms(text: str) -> list[list[str]]:
    """Each form as its three wordings and its query."""
    blocks = [form.splitlines() for form in text.strip().split("\n\n")]
    return [[*block[:3], " ".join(map(str.strip, block[3:]))] for block in blocks]


def shop(random_: random.Random) -> Iterator[str]:
    """The INSERT statements. No two products have one price or stock, so that orders are unique."""
    joined = random_.sample(range(4 * 365), len(CUSTOMERS))
    for i, (name, day) in enumerate(zip(CUSTOMERS, joined, strict=True), 1):
        city, when = random_.choice(CITIES), date(2021, 1, 1) + timedelta(days=day)
        yield f"INSERT INTO customers VALUES ({i}, '{name}', '{city}', '{when}');"
    prices = random_.sample(range(500, 20000, 50), len(PRODUCTS))
    stocks = random_.sample(range(1, 110), len(PRODUCTS))
    for i, name in enumerate(PRODUCTS, 1):
        category, price = CATEGORIES[(i - 1) // len(WORDS)], prices[i - 1] / 100
        yield (
            f"INSERT INTO products VALUES ({i}, '{name}', '{category}', {price}, {stocks[i - 1]});"
        )
    buyers, sold = range(1, len(CUSTOMERS) - 11), random_.sample(range(1, len(PRODUCTS) + 1), 40)
    for i in range(1, VALUES["number"][-1] + 1):
        day = random_.choice(VALUES["day"]) if i % 2 else date(2023, 1, 1) + timedelta(days=4 * i)
        status = random_.choice(STATUSES)
        yield f"INSERT INTO orders VALUES ({i}, {random_.choice(buyers)}, '{day}', '{status}');"
        for product in random_.sample(sold, random_.randint(1, 4)):
            yield f"INSERT INTO items VALUES ({i}, {product}, {random_.randint(1, 9)});"


def combinations(
    form: list[str], random_: random.Random, database: sqlite3.Connection
) -> list[dict[str, Any]]:
    """At most `MOST` ways to fill a form's gaps so that the query's result is more than 0."""
    names = [name for name in VALUES if f"{{{name}}}" in form[-1]]
    every = [dict(zip(names, v, strict=True)) for v in itertools.product(*map(VALUES.get, names))]
    chosen = []
    for values in random_.sample(every, len(every)):
        if "price" in values:
            values["price2"] = values["price"] + random_.choice(range(10, 90, 10))
        result = database.execute(form[-1].format(**values)).fetchone()
        if result not in {None, (0,), (None,)} and len(chosen) < MOST:
            chosen.append(values)
    return chosen


def row(form: list[str], values: dict[str, Any], number: int, wording: int) -> dict[str, Any]:
    question, query = (text.format(**values) for text in (form[wording], form[-1]))
    return {"system": SYSTEM, "prompt": question, "completion": query, "form": number}


def main() -> None:
    random_ = random.Random(0)
    script = SCHEMA + "\n".join(shop(random_)) + "\n"
    database = sqlite3.connect(":memory:")
    database.executescript(script)
    seen, unseen = forms(FORMS), forms(UNSEEN)
    train, held_out, new = [], [], []
    for number, form in enumerate(seen + unseen, 1):
        filled = combinations(form, random_, database)
        rows = [row(form, v, number, w) for v in filled for w in range(3)]
        if form in unseen:
            new += random_.sample(rows, math.ceil(UNSEEN_ROWS / len(unseen)))
        else:
            share = 3 * max(1, len(filled) // 10)
            held_out += rows[:share]
            train += rows[share:]
    train = random_.sample(train, TRAIN)
    held_out = random_.sample(held_out, SEEN_ROWS) + random_.sample(new, UNSEEN_ROWS)
    random_.shuffle(held_out)
    (HERE / "shop.sql").write_text(script, encoding="utf-8")
    for name, rows in (("train", train), ("eval", held_out)):
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (HERE / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        counts = [r["form"] for r in rows]
        print(f"{name}.jsonl: {len(rows)} rows of {len(set(counts))} forms")


if __name__ == "__main__":
    main()
