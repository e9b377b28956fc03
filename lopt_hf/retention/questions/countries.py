"""Countries with their capitals, currencies and codes; where sources differ, a country is left out."""

from dataclasses import dataclass

__all__ = ["CONTINENTS", "COUNTRIES", "Country"]


@dataclass(frozen=True)
class Country:
    """A country.

    Parameters:
        name: Its usual English name.
        capital: Its capital.
        currency: Its currency, without the country's adjective.
        code: Its two-letter code, ISO 3166-1.
        continent: Initials of its continent.
        level: 1, known to everybody, to 5.
    """

    name: str
    capital: str
    currency: str
    code: str
    continent: str
    level: int


CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}

_LINES = """\
France|Paris|euro|FR|EU|1
Germany|Berlin|euro|DE|EU|1
Italy|Rome|euro|IT|EU|1
Spain|Madrid|euro|ES|EU|1
United Kingdom|London|pound sterling|GB|EU|1
Japan|Tokyo|yen|JP|AS|1
China|Beijing|yuan|CN|AS|1
India|New Delhi|rupee|IN|AS|1
Russia|Moscow|ruble|RU|EU|1
Canada|Ottawa|dollar|CA|NA|1
Mexico|Mexico City|peso|MX|NA|1
Brazil|Brasilia|real|BR|SA|1
Australia|Canberra|dollar|AU|OC|1
Egypt|Cairo|pound|EG|AF|1
Greece|Athens|euro|GR|EU|1
Portugal|Lisbon|euro|PT|EU|2
Ireland|Dublin|euro|IE|EU|2
Sweden|Stockholm|krona|SE|EU|2
Norway|Oslo|krone|NO|EU|2
Denmark|Copenhagen|krone|DK|EU|2
Finland|Helsinki|euro|FI|EU|2
Poland|Warsaw|zloty|PL|EU|2
Austria|Vienna|euro|AT|EU|2
Switzerland|Bern|franc|CH|EU|2
Belgium|Brussels|euro|BE|EU|2
Argentina|Buenos Aires|peso|AR|SA|2
Chile|Santiago|peso|CL|SA|2
Peru|Lima|sol|PE|SA|2
Colombia|Bogota|peso|CO|SA|2
Cuba|Havana|peso|CU|NA|2
South Korea|Seoul|won|KR|AS|2
Thailand|Bangkok|baht|TH|AS|2
Vietnam|Hanoi|dong|VN|AS|2
Iran|Tehran|rial|IR|AS|2
Iraq|Baghdad|dinar|IQ|AS|2
Saudi Arabia|Riyadh|riyal|SA|AS|2
Turkey|Ankara|lira|TR|AS|2
New Zealand|Wellington|dollar|NZ|OC|2
Kenya|Nairobi|shilling|KE|AF|2
Nigeria|Abuja|naira|NG|AF|2
Hungary|Budapest|forint|HU|EU|3
Romania|Bucharest|leu|RO|EU|3
Ukraine|Kyiv|hryvnia|UA|EU|3
Serbia|Belgrade|dinar|RS|EU|3
Iceland|Reykjavik|krona|IS|EU|3
Slovakia|Bratislava|euro|SK|EU|3
Lithuania|Vilnius|euro|LT|EU|3
Latvia|Riga|euro|LV|EU|3
Estonia|Tallinn|euro|EE|EU|3
Luxembourg|Luxembourg City|euro|LU|EU|3
Pakistan|Islamabad|rupee|PK|AS|3
Bangladesh|Dhaka|taka|BD|AS|3
Nepal|Kathmandu|rupee|NP|AS|3
Malaysia|Kuala Lumpur|ringgit|MY|AS|3
Philippines|Manila|peso|PH|AS|3
Afghanistan|Kabul|afghani|AF|AS|3
Syria|Damascus|pound|SY|AS|3
Lebanon|Beirut|pound|LB|AS|3
Jordan|Amman|dinar|JO|AS|3
Mongolia|Ulaanbaatar|togrog|MN|AS|3
Morocco|Rabat|dirham|MA|AF|3
Algeria|Algiers|dinar|DZ|AF|3
Tunisia|Tunis|dinar|TN|AF|3
Ethiopia|Addis Ababa|birr|ET|AF|3
Ghana|Accra|cedi|GH|AF|3
Senegal|Dakar|CFA franc|SN|AF|3
Venezuela|Caracas|bolivar|VE|SA|3
Ecuador|Quito|dollar|EC|SA|3
Uruguay|Montevideo|peso|UY|SA|3
Jamaica|Kingston|dollar|JM|NA|3
Panama|Panama City|balboa|PA|NA|3
Costa Rica|San Jose|colon|CR|NA|3
Albania|Tirana|lek|AL|EU|4
North Macedonia|Skopje|denar|MK|EU|4
Slovenia|Ljubljana|euro|SI|EU|4
Bosnia and Herzegovina|Sarajevo|convertible mark|BA|EU|4
Moldova|Chisinau|leu|MD|EU|4
Belarus|Minsk|ruble|BY|EU|4
Malta|Valletta|euro|MT|EU|4
Georgia|Tbilisi|lari|GE|AS|4
Armenia|Yerevan|dram|AM|AS|4
Azerbaijan|Baku|manat|AZ|AS|4
Kazakhstan|Astana|tenge|KZ|AS|4
Uzbekistan|Tashkent|som|UZ|AS|4
Cambodia|Phnom Penh|riel|KH|AS|4
Laos|Vientiane|kip|LA|AS|4
Qatar|Doha|riyal|QA|AS|4
Oman|Muscat|rial|OM|AS|4
Yemen|Sanaa|rial|YE|AS|4
Libya|Tripoli|dinar|LY|AF|4
Sudan|Khartoum|pound|SD|AF|4
Uganda|Kampala|shilling|UG|AF|4
Rwanda|Kigali|franc|RW|AF|4
Zambia|Lusaka|kwacha|ZM|AF|4
Angola|Luanda|kwanza|AO|AF|4
Mozambique|Maputo|metical|MZ|AF|4
Madagascar|Antananarivo|ariary|MG|AF|4
Namibia|Windhoek|dollar|NA|AF|4
Mali|Bamako|CFA franc|ML|AF|4
Paraguay|Asuncion|guarani|PY|SA|4
Guatemala|Guatemala City|quetzal|GT|NA|4
Honduras|Tegucigalpa|lempira|HN|NA|4
Nicaragua|Managua|cordoba|NI|NA|4
Haiti|Port-au-Prince|gourde|HT|NA|4
Fiji|Suva|dollar|FJ|OC|4
Montenegro|Podgorica|euro|ME|EU|5
Andorra|Andorra la Vella|euro|AD|EU|5
Liechtenstein|Vaduz|franc|LI|EU|5
San Marino|San Marino|euro|SM|EU|5
Kyrgyzstan|Bishkek|som|KG|AS|5
Tajikistan|Dushanbe|somoni|TJ|AS|5
Turkmenistan|Ashgabat|manat|TM|AS|5
Bhutan|Thimphu|ngultrum|BT|AS|5
Brunei|Bandar Seri Begawan|dollar|BN|AS|5
Maldives|Male|rufiyaa|MV|AS|5
Bahrain|Manama|dinar|BH|AS|5
Botswana|Gaborone|pula|BW|AF|5
Malawi|Lilongwe|kwacha|MW|AF|5
Lesotho|Maseru|loti|LS|AF|5
Burkina Faso|Ouagadougou|CFA franc|BF|AF|5
Niger|Niamey|CFA franc|NE|AF|5
Chad|N'Djamena|CFA franc|TD|AF|5
Gabon|Libreville|CFA franc|GA|AF|5
Togo|Lome|CFA franc|TG|AF|5
Sierra Leone|Freetown|leone|SL|AF|5
Liberia|Monrovia|dollar|LR|AF|5
Gambia|Banjul|dalasi|GM|AF|5
Guinea|Conakry|franc|GN|AF|5
Mauritania|Nouakchott|ouguiya|MR|AF|5
Eritrea|Asmara|nakfa|ER|AF|5
Djibouti|Djibouti|franc|DJ|AF|5
Mauritius|Port Louis|rupee|MU|AF|5
Suriname|Paramaribo|dollar|SR|SA|5
Guyana|Georgetown|dollar|GY|SA|5
Belize|Belmopan|dollar|BZ|NA|5
Bahamas|Nassau|dollar|BS|NA|5
Barbados|Bridgetown|dollar|BB|NA|5
Samoa|Apia|tala|WS|OC|5
Tonga|Nuku'alofa|pa'anga|TO|OC|5
Vanuatu|Port Vila|vatu|VU|OC|5
Papua New Guinea|Port Moresby|kina|PG|OC|5"""

COUNTRIES = tuple(
    Country(name, capital, currency, code, continent, int(level))
    for name, capital, currency, code, continent, level in (line.split("|") for line in _LINES.splitlines())
)
