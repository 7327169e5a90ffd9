"""Domains of the JSON task, their keys, and the sentences that mention them. The two splits share no sentence."""

from __future__ import annotations

from .rows import Split

DOMAINS: dict[str, dict[str, str]] = {
    "table": {"guest": "person", "people": "amount", "city": "city", "date": "date", "time": "time"},
    "travel": {"passenger": "person", "origin": "city", "destination": "city", "date": "date", "seats": "amount"},
    "order": {"customer": "person", "item": "item", "color": "color", "quantity": "amount", "city": "city"},
    "contact": {"name": "person", "job": "job", "company": "company", "city": "city"},
    "meeting": {"host": "person", "company": "company", "city": "city", "date": "date", "time": "time"},
    "parcel": {"sender": "person", "recipient": "person", "item": "item", "weight": "amount", "destination": "city"},
}

SENTENCES: dict[str, dict[Split, list[str]]] = {
    "table": {
        "train": [
            "Book a table for {people} in {city} on {date} at {time} under the name {guest}.",
            "{guest} wants dinner for {people} people in {city} on {date}.",
            "Could you reserve a table in {city} for {people} guests at {time}?",
            "We are {people} and would like to eat in {city} at {time}, the name is {guest}.",
            "Table for {people}, {date}, {time}, please. The reservation is for {guest}.",
            "On {date} {guest} is taking {people} friends out for lunch in {city}.",
            "please hold {people} places at {time} on {date} for {guest}",
            "Dinner in {city}: {people} people, {time}, booked by {guest}.",
            "{guest} and friends, {people} in all, will be there on {date} at {time}.",
            "Do you have space for {people} in {city} on {date} at {time}?",
            "I'd like to eat in {city} with {people} people on {date}; write it down for {guest}.",
            "Keep a table free at {time} on {date}; {guest} comes with {people} people.",
            "a quiet corner for {people} in {city} around {time}, put down the name {guest}",
        ],
        "heldout": [
            "I'd love a spot for {people} in {city} at {time} on {date}; put it under {guest}.",
            "{guest} will arrive with a party of {people} at {time} on {date}.",
            "Is there room for {people} of us in {city} on {date} around {time}?",
        ],
    },
    "travel": {
        "train": [
            "{passenger} needs a flight from {origin} to {destination} on {date}.",
            "Book {seats} seats from {origin} to {destination} for {date}.",
            "I want to travel to {destination} from {origin} on {date} with {seats} people, my name is {passenger}.",
            "Train tickets for {passenger}: {origin} to {destination}, {date}, {seats} seats.",
            "On {date} {passenger} leaves {origin} and flies to {destination}.",
            "We need {seats} tickets to {destination} leaving from {origin}.",
            "reserve {seats} seats on the bus that goes from {origin} to {destination} for {passenger}",
            "{passenger} is heading for {destination} on {date} and starts in {origin}.",
            "Find {passenger} a train that leaves {origin} on {date} and arrives in {destination}.",
            "{passenger} wants {seats} seats and goes from {origin} all the way to {destination}.",
            "There will be {seats} people going to {destination} on {date}, starting in {origin}.",
            "From {origin} to {destination} for {passenger}, please, {seats} places on {date}.",
            "Get me out of {origin} and into {destination} by {date}, says {passenger}.",
        ],
        "heldout": [
            "Please find {passenger} a ride that departs {origin} on {date} and reaches {destination}.",
            "There are {seats} of us going to {destination}, starting out in {origin} on {date}.",
            "{passenger} plans to go from {origin} over to {destination} and wants {seats} places.",
        ],
    },
    "order": {
        "train": [
            "{customer} ordered {quantity} of the {color} {item} for the shop in {city}.",
            "I would like to buy {quantity} units of the {item} in {color}, shipped to {city}.",
            "Send one {color} {item} to {customer} in {city}.",
            "Please add {quantity} pieces of {item} to the order of {customer}, color {color}.",
            "{customer} from {city} asked for a {color} {item}.",
            "The store in {city} needs {quantity} more of the {item} in {color}.",
            "new order by {customer}: {quantity} x {item}, {color}, delivery to {city}",
            "We sold {quantity} of the {color} {item} to {customer}.",
            "Can you ship the {color} {item} to {customer} in {city}?",
            "{customer} wants {quantity} copies of the {item}, the {color} one, in {city}.",
            "Our shop in {city} is out of the {color} {item}, send {quantity} more to {customer}.",
            "{customer} lives in {city} and is waiting for {quantity} of your {item} in {color}.",
            "Bring the {item} in {color} to {customer} over in {city}.",
        ],
        "heldout": [
            "{customer} is looking for {quantity} copies of our {color} {item} and lives in {city}.",
            "Can you deliver the {item}, the {color} one, to {customer} over in {city}?",
            "Our branch at {city} has run out, so ship {quantity} of the {item} in {color} to {customer}.",
        ],
    },
    "contact": {
        "train": [
            "{name} works as a {job} at {company} in {city}.",
            "My name is {name} and I am a {job} for {company}.",
            "The {job} at {company} is called {name} and lives in {city}.",
            "Meet {name}, a {job} from {city}.",
            "{company} hired {name} as its new {job} in {city}.",
            "In {city} you can reach {name}, the {job} of {company}.",
            "{name}, {job}, {company}, {city}.",
            "After moving to {city}, {name} became a {job} with {company}.",
            "If you are in {city} and want a {job}, call {name}.",
            "{company} has a {job} in {city} whose name is {name}.",
            "Yesterday I met {name} of {company}, employed there as a {job}.",
            "Ask {name} from {company} when you need a {job} near {city}.",
            "The only {job} around {city} is {name}.",
        ],
        "heldout": [
            "I spoke with {name} from {company}, who is employed as a {job} near {city}.",
            "{company} has an office in {city} where {name} is the only {job}.",
            "If you need a {job} around {city}, ask for {name}.",
        ],
    },
    "meeting": {
        "train": [
            "{host} set up a meeting with {company} in {city} on {date} at {time}.",
            "The meeting with {company} starts at {time} on {date}.",
            "{host} will see the people of {company} on {date} in {city}.",
            "Call with {company} at {time}, hosted by {host}, on {date}.",
            "On {date} at {time} there is a workshop at {company} led by {host}.",
            "please schedule {company} for {time} in {city} with {host}",
            "{company} invited {host} to {city} for {date}.",
            "Reminder: {host} meets {company} at {time} on {date} in {city}.",
            "Write {company} into the diary of {host}: {date}, {time}, {city}.",
            "The people of {company} come to {city} at {time} and want to talk to {host}.",
            "{host} changed the call with {company} to {date} at {time}.",
            "Note for {host}: {company} visits the office in {city} on {date}.",
            "{company} and {host} agreed on {time}, {date}, in {city}.",
        ],
        "heldout": [
            "Put {company} in the calendar of {host} for {date}, {time}, at the office in {city}.",
            "The team of {company} comes to {city} at {time} to talk with {host}.",
            "{host} moved the appointment with {company} to {date} at {time}.",
        ],
    },
    "parcel": {
        "train": [
            "{sender} is sending a {item} of {weight} kilos to {recipient} in {destination}.",
            "The parcel from {sender} to {recipient} weighs {weight} kg and holds a {item}.",
            "Ship the {item} to {recipient} in {destination}; the sender is {sender}.",
            "A package of {weight} kg goes to {destination}, addressed to {recipient}.",
            "{recipient} gets a {item} from {sender}, weight {weight} kg.",
            "From {sender}: one {item}, {weight} kilos, for {recipient} in {destination}.",
            "please deliver this {item} to {recipient}, {destination}, on behalf of {sender}",
            "{sender} mailed {recipient} a {item} that weighs {weight} kilograms.",
            "{recipient} in {destination} expects a {item} that {sender} mailed.",
            "{recipient} is still waiting for the parcel of {sender}, a {item} of {weight} kg.",
            "The {item} that {sender} sent is on the road to {recipient} in {destination}.",
            "{sender} left a {item} of {weight} kilos for {recipient} at {destination}.",
            "A {weight} kg {item} travels from {sender} to {recipient}.",
        ],
        "heldout": [
            "A {item} of {weight} kg is on its way from {sender} to {recipient} at {destination}.",
            "{recipient} in {destination} is waiting for the {item} that {sender} posted.",
            "{sender} dropped off {weight} kilos of goods, a {item}, for {recipient}.",
        ],
    },
}
