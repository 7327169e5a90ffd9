"""Many more names and everyday words for the training rows of the JSON task; no held-out row draws from here.

A tokenizer writes most known names as one token after a space and as several after a quotation mark. A model learns
that change of spelling from many names, not from a few names seen often.
"""

from __future__ import annotations

from .rows import listed

FIRST_NAMES = listed("""
Aaron Abel Abigail Abraham Ada Adam Adelaide Adele Adrian Agatha Agnes Ahmed Aisha Alan Albert Alejandro Alex
Alexander Alexis Alfred Ali Alina Alison Allan Alma Alvin Amanda Amelia Amos Amy Ana Anders Andre Andrea Andrew Angela
Angelo Angus Anita Anna Anne Annie Anthony Antonio Ari Ariel Arlene Arnold Arthur Ashley Astrid Audrey Austin Ava
Barbara Barry Basil Beatrix Becky Belinda Ben Benjamin Bernadette Bernard Bert Bertha Beth Bethany Betty Beverly Bill
Blair Bob Bonnie Boris Brad Bradley Brandon Brenda Brian Bridget Bruce Bryan Byron Calvin Camille Candice Carl Carlos
Carmen Carol Caroline Cary Casey Cassandra Catherine Cecil Cecilia Celia Chad Charles Charlie Charlotte Chelsea Cheryl
Chester Chloe Chris Christian Christine Christopher Cindy Claire Clara Clarence Claude Claudia Clement Clifford Clint
Clive Cody Colin Connor Constance Cora Corey Craig Crystal Curtis Cynthia Cyril Daisy Dale Damian Dan Dana Danielle
Darren Dave David Dean Debbie Deborah Dee Delia Denise Dennis Derek Desmond Diana Diane Dick Diego Dirk Dolores
Dominic Dominique Don Donald Donna Doreen Doris Dorothy Doug Douglas Drew Duane Duke Duncan Dwight Dylan Earl Ed Eddie
Edgar Edith Edmund Eduardo Edward Edwin Eileen Elaine Eleanor Eli Elias Elise Elizabeth Ella Ellen Elliot Ellis Eloise
Elsa Elsie Elvira Emilia Emily Emma Emmanuel Enid Enrique Eric Erika Ernest Ernie Errol Esme Estelle Ethan Eugene
Eunice Eva Evan Eve Evelyn Fabian Faith Fay Ferdinand Fergus Fernando Fiona Flora Florence Floyd Frances Frank Frankie
Franklin Fred Freda Freddie Frederick Gabriel Gail Gareth Garth Gary Gavin Gene Genevieve Geoffrey George Georgia
Georgina Gerald Gerard Gilbert Giles Gillian Gina Giovanni Gladys Glen Glenda Gloria Godfrey Gordon Graham Grant Greg
Gregory Gretchen Guy Gwen Hank Harold Harriet Harry Harvey Hassan Hazel Heather Hector Heidi Helen Henrietta Henry
Herbert Herman Hilary Hilda Holly Hope Horace Howard Hubert Humphrey Ian Ibrahim Ida Igor Ike Imogen Inez Iris Irma
Irving Isaac Isabel Isla Ismail Ivy Jack Jackie Jacob Jake James Jamie Jan Jane Janet Janice Jared Jason Jasper Jay
Jean Jeanette Jeff Jennifer Jenny Jeremiah Jeremy Jerome Jerry Jess Jessica Jill Jim Jimmy Jo Joan Joanna Jodie Joel
Joey Johan John Johnny Jon Jonathan Jordan Jorge Jose Joseph Josephine Joshua Joy Joyce Juan Jude Judith Judy Julia
Julian Julie June Justin Kamal Karl Kate Katherine Kathleen Kathy Katie Kay Keith Kelly Ken Kenneth Kenny Kent Kerry
Kevin Kim Kirk Kirsten Kit Kurt Kyle Lana Lance Larry Laura Lauren Lawrence Lee Leo Leon Leonard Leroy Leslie Lester
Levi Lewis Lily Linda Lionel Lisa Lloyd Lois Lola Loretta Lorna Lorraine Louis Louise Lucas Lucy Luis Luke Luther
Lydia Lyle Lynn Mabel Madeleine Mae Maggie Magnus Malcolm Mandy Marc Marcel Marcia Marcus Margaret Margot Maria Marian
Marie Marilyn Mario Marion Marjorie Mark Marlene Marshall Martha Martin Marvin Mary Matthew Maud Maureen Maurice Max
Maxine May Megan Melanie Melissa Melvin Meredith Michael Mick Miguel Mike Mildred Miles Millie Milton Minnie Miranda
Mitchell Mohammed Molly Mona Monica Morgan Muriel Myra Myron Nancy Naomi Natalie Nathan Nathaniel Ned Neil Nellie
Nelson Nicholas Nick Nicolas Nicole Nigel Nikita Nina Noah Noel Noelle Norma Norman Odette Olive Oliver Olivia Omar
Opal Orlando Orson Owen Pablo Paige Pamela Pat Patience Patricia Patrick Patty Paul Pauline Pearl Peggy Penelope Penny
Percy Perry Pete Peter Phil Philip Phoebe Phyllis Pierre Piper Polly Preston Rachel Ralph Ramon Randall Randy Ray
Raymond Rebecca Reginald Rex Rhoda Ricardo Richard Rick Ricky Rita Rob Robbie Robert Roberta Robin Rochelle Rod Rodney
Roger Roland Ron Ronald Ronnie Rory Rosalind Rose Rosemary Ross Rowan Roxanne Roy Ruby Rudolph Rufus Rupert Russell
Ruth Ryan Sabrina Sadie Sally Sam Samantha Samuel Sandra Sara Sarah Saul Scott Sean Sebastian Selena Serena Sergio
Seth Shane Shannon Sharon Shaun Sheila Shelley Sherman Shirley Sid Sidney Sierra Silvia Solomon Sonia Sophie Spencer
Stacy Stanley Stella Stephen Steve Steven Stewart Stuart Sue Summer Susan Susanna Suzanne Sven Sybil Sylvia Tabitha
Tamara Tanya Tasha Ted Teresa Terry Thaddeus Thelma Theo Theresa Thomas Timothy Tina Toby Todd Tom Tony Tracy Travis
Trent Trevor Tristan Trudy Tyler Uma Uriah Valerie Vanessa Vern Vernon Veronica Vicky Victor Victoria Vince Vincent
Viola Violet Virginia Vivian Wallace Wanda Warren Wayne Wendell Wesley Wilbur Wilfred Will Willa William Willie Wilma
Xavier Yolanda Yvonne Zachary
""")

LAST_NAMES = listed("""
Abrams Acosta Adams Addison Ahmed Albright Aldrich Alexander Allen Alvarez Ames Anderson Andrews Archer Armstrong
Arnold Ashford Atkins Atkinson Austen Avery Ayers Bacon Bailey Baker Baldwin Ball Banerjee Banks Barber Barker Barlow
Barnes Barrett Barrow Bartlett Barton Bates Bauer Beard Beck Becker Bell Bennett Benson Bentley Berger Bernstein Berry
Best Bird Bishop Black Blackwell Blair Blake Bolton Bond Booth Bowen Bowman Boyd Boyle Bradford Bradley Brady Brandt
Bray Brennan Briggs Britton Brock Brooks Brown Browning Bruce Bryant Buck Buckley Bull Burgess Burke Burnett Burns
Burton Bush Butler Byrd Byrne Cain Calhoun Callahan Cameron Campbell Cannon Carey Carlson Carpenter Carr Carroll
Carter Case Casey Castro Chambers Chan Chandler Chang Chapman Chase Chen Christensen Christian Clark Clay Clayton
Clements Cobb Cohen Cole Coleman Collins Conner Conrad Conway Cook Cooke Cooper Copeland Corbett Costa Cowan Cox Craig
Crane Crawford Crosby Cross Cruz Cunningham Curtis Dahl Dale Dalton Daly Daniels Davidson Davies Davis Dawson Dean
Decker Delgado Denton Diaz Dickson Dixon Dodd Doherty Donovan Dorsey Douglas Drake Drew Dudley Duffy Duke Duncan Dunn
Durham Dyer Eaton Edwards Elliott Ellis Emerson English Erickson Espinoza Estrada Evans Farmer Farrell Faulkner
Ferguson Fernandez Ferrari Field Finch Finley Fisher Fitzgerald Fleming Fletcher Flores Flynn Foley Forbes Ford
Foreman Foster Fowler Fox Francis Frank Franklin Fraser Freeman French Frost Fry Fuller Gage Gaines Gale Garcia
Gardner Garner Garrett Garrison Gates George Gibson Giles Gill Gilmore Glover Golden Gomez Gonzalez Goodman Goodwin
Gordon Graham Grant Graves Gray Green Greer Gregory Griffin Gross Guerrero Gupta Hale Hall Hamilton Hammond Hancock
Hansen Hardy Harmon Harper Harrington Harris Harrison Hart Hastings Hawkins Hayes Haynes Heath Henderson Henry Hensley
Herman Hernandez Herrera Hewitt Hicks Higgins Hill Hines Hobbs Hodges Hogan Holland Holloway Holmes Holt Hood Hooper
Hoover Hopkins Horn Horton House Houston Howard Howe Howell Hubbard Hudson Huff Hughes Hull Humphrey Hunt Hunter Hurst
Hussein Ingram Irwin Jackson Jacobs James Jarvis Jefferson Jenkins Jennings Jimenez Johnson Johnston Jones Joseph
Joshi Joyce Juarez Kane Kaplan Kaufman Kaur Keating Keith Kelly Kemp Kennedy Kent Kerr Khan Kim King Kirby Kirk Klein
Knapp Knight Kramer Kumar Lamb Lambert Lane Lang Lara Larsen Law Lawrence Lawson Leach Leblanc Lee Leon Leonard Lester
Levine Levy Lewis Lin Lindsay Lindsey Little Liu Lloyd Locke Logan Long Lopez Lowe Lucas Luna Lynch Lyons MacDonald
Mack Mackenzie Madden Maldonado Malone Mancini Mann Manning Marks Marsh Marshall Martin Martinez Mason Matthews
Maxwell May Mayer Maynard McBride McCall McCarthy McCormick McDonald McGee McIntyre McKenna Mead Medina Mehta Melton
Mendoza Mercer Merritt Meyer Meyers Michael Middleton Miles Miller Mills Mitchell Monroe Montgomery Moody Moon Moore
Morales Moran Moreno Morgan Morris Morrison Morrow Morse Morton Moses Moss Mueller Muller Munoz Murphy Murray Myers
Nakamura Nash Neal Nelson Newell Newman Newton Nguyen Nichols Nielsen Nixon Noble Nolan Norman Norris Norton Oconnor
Odell Oliver Olsen Orr Osborn Osborne Owen Owens Pace Page Palmer Park Parker Parks Parsons Patel Patterson Paul Payne
Peacock Pearson Peck Pena Perez Perkins Perry Peters Peterson Philips Phillips Pierce Pike Pitt Poole Pope Porter
Potter Powell Powers Pratt Preston Price Prince Proctor Pugh Quinlan Ramirez Randall Rangel Rasmussen Ray Raymond Reed
Reeves Reid Reilly Reyes Reynolds Rhodes Rice Rich Richards Richardson Riddle Riley Rios Ritter Rivera Robbins Roberts
Robertson Robinson Rocha Roche Rodriguez Rogers Roman Romero Rose Rosen Ross Roth Rowe Rowland Roy Rubio Ruiz Rush
Russell Ryan Salazar Sanchez Sanders Santana Sato Saunders Savage Sawyer Schneider Schultz Scott Sharma Sharp Shaw
Shepherd Sherman Short Silva Simmons Simpson Singh Singleton Skinner Sloan Small Smith Snow Snyder Solis Soto Sousa
Sparks Spencer Stafford Stanley Stark Steele Stein Stephens Stevens Stewart Stokes Stone Stout Strickland Strong
Stuart Sullivan Summers Sutton Suzuki Swanson Sweeney Tate Taylor Temple Terry Thomas Thompson Thornton Todd Torres
Townsend Travis Tucker Turner Tyler Underwood Valdez Vance Vaughn Vega Vincent Wade Wagner Walker Wallace Waller Walls
Walsh Walter Walters Walton Ward Warren Washington Waters Watson Watts Weaver Webb Weiss Welch Wells West Wheeler
White Whitehead Whitney Wiggins Wilkins Wilkinson Williams Wilson Winters Wise Wolf Wong Wood Woodard Woods Woodward
Wright Wyatt Yang Yates Yoder York Young Zhang
""")

CITIES = listed("""
Aberdeen Abuja Adelaide Afghanistan Africa Alabama Alaska Albania Albany Alexandria Algeria Algiers Almaty America
Amman Amsterdam Anchorage Andorra Angola Appleton Arabia Arcadia Argentina Arizona Arkansas Arlington Armenia Ashland
Asia Astana Augusta Aurora Australia Austria Avalon Avignon Azerbaijan Baghdad Bahamas Bakersfield Baku Baltimore
Bangalore Bangladesh Barcelona Basel Bath Bavaria Bedford Beijing Beirut Belarus Belgium Belize Benin Bergen Berkeley
Berkshire Bermuda Bern Bethlehem Beverley Bilbao Birmingham Bolivia Bologna Bonn Bosnia Botswana Boulder Bradford
Brasilia Brazil Bremen Bridgeport Brighton Bristow Britain Brittany Brno Brooklyn Buffalo Bulgaria Burlington Burma
Calais Cali California Cambodia Cambridge Camden Cameroon Canada Canberra Cannes Canterbury Carlisle Carolina Carthage
Casablanca Catalonia Catania Chad Charleston Charlotte Chatham Chattanooga Chester Cheyenne Chile China Cincinnati
Cleveland Clinton Colchester Cologne Colombia Colorado Columbia Columbus Concord Congo Connecticut Cordoba Cork
Cornwall Corsica Coventry Crete Croatia Croydon Cuba Cumbria Cyprus Dakar Dakota Damascus Darlington Darwin Dayton
Delaware Delft Denmark Derby Detroit Devon Dhaka Doha Dorset Dover Dresden Dubai Dundee Durham Dusseldorf Eastbourne
Ecuador Edinburgh Edmonton Egypt Elgin England Eritrea Essen Essex Estonia Ethiopia Eugene Europe Evanston Exeter
Fairfield Fargo Fayetteville Fiji Finland Flanders Florence Florida Folkestone France Frankfurt Fremont Fresno Gabon
Gainesville Galicia Galway Gdansk Genoa Georgia Germany Ghana Ghent Gibraltar Gloucester Gothenburg Granada Graz
Greece Greenland Greenwich Grenoble Grimsby Guadalajara Guatemala Guildford Guinea Guyana Hague Haiti Halifax
Hampshire Hanover Harlem Harrisburg Harrogate Hartford Hastings Havre Hawaii Heidelberg Hereford Hiroshima Hobart
Holland Hollywood Honduras Honolulu Hull Hungary Huntington Hyderabad Iceland Idaho Illinois Independence India
Indiana Indonesia Inverness Iowa Ipswich Iran Iraq Ireland Irvine Islamabad Israel Italy Izmir Jackson Jamaica
Jamestown Japan Java Jersey Jerusalem Johannesburg Jordan Kabul Kansas Karachi Kathmandu Kendal Kent Kentucky Kenya
Kiev Kingston Knoxville Korea Kosovo Krakow Kuwait Lafayette Lancaster Laos Laredo Latvia Lausanne Lebanon Leicester
Leipzig Lexington Liberia Libya Lincoln Linz Lithuania Liverpool London Louisiana Louisville Lowell Lucerne Luton
Luxembourg Lynchburg Macedonia Macon Madagascar Madison Maidstone Maine Malaga Malawi Malaysia Mali Malmo Malta
Manchester Manhattan Marseille Maryland Massachusetts Mauritius Medina Melbourne Memphis Mexico Michigan Middletown
Milwaukee Minneapolis Minnesota Minsk Mississippi Missouri Mobile Modesto Moldova Mombasa Monaco Mongolia Montana
Monterey Montgomery Morocco Moscow Mozambique Namibia Nantes Nashville Nebraska Nepal Netherlands Nevada Newark
Newbury Newcastle Newport Nicaragua Nigeria Norfolk Normandy Northampton Norway Norwich Nottingham Nuremberg Oakland
Odessa Ohio Oklahoma Olympia Omaha Oman Ontario Oregon Orlando Orleans Ottawa Oxford Oxnard Padua Paisley Pakistan
Palermo Palestine Panama Paraguay Parma Pasadena Paterson Pennsylvania Penzance Peoria Peru Perugia Peterborough
Philadelphia Pisa Pittsburgh Plymouth Poland Pomona Poole Portsmouth Portugal Potsdam Preston Pretoria Princeton
Providence Prussia Qatar Quebec Queens Queensland Raleigh Ravenna Reading Reno Reykjavik Richmond Riverside Roanoke
Rochester Rockford Romania Rouen Rugby Russia Rwanda Sacramento Salem Salinas Salisbury Salzburg Samoa Santander
Saratoga Sardinia Savannah Saxony Scarborough Scotland Scranton Senegal Serbia Shanghai Sheffield Shenzhen Shrewsbury
Siberia Sicily Siena Silesia Singapore Slough Slovakia Slovenia Somalia Somerset Southampton Spain Spokane Springfield
Stafford Stamford Stirling Stockton Strasbourg Stratford Stuttgart Sudan Suffolk Sumatra Sunderland Surrey Sussex
Swansea Sweden Swindon Switzerland Syracuse Syria Tacoma Taipei Taiwan Tampa Tanzania Tasmania Taunton Tbilisi Tehran
Telford Tennessee Texas Thailand Tibet Tobago Toledo Topeka Torquay Toulouse Trenton Trieste Trinidad Trondheim Truro
Tucson Tulsa Tunisia Turkey Tuscany Tyne Tyrol Uganda Ukraine Ulster Uruguay Utah Utrecht Valencia Valparaiso
Venezuela Venice Ventura Vermont Verona Victoria Vietnam Waco Wakefield Wales Walsall Waltham Warwick Washington
Waterloo Watford Wellington Wichita Wigan Wilmington Winchester Windsor Winnipeg Wisconsin Woking Wolverhampton
Worcester Wyoming Yemen Yerevan Yonkers York Yorkshire Yuma Zambia Zimbabwe
""")

COLORS = listed("""
apricot azure blond brass bright checkered cherry chestnut chocolate dark dotted emerald faded ginger hazel honey jade
lemon lime matte mauve metallic pale pearl platinum raspberry rose sand sapphire slate striped tan transparent wine
""")

ITEMS = listed("""
accordion alarm album anchor antenna apron aquarium armchair armor atlas awning axe badge bag bagpipe ball balloon
bandage banner barrel bathtub battery bead beaker bell belt bench binoculars blender blouse board boat boiler bomb
bonnet book boot bottle bouquet bowl box bracelet bracket brick briefcase brush buckle bugle bulb bumper button cabin
cabinet cable cage calculator calendar candlestick cannon canoe canvas cap caravan card cardigan carriage cart
cartridge case cassette catalog cello ceramic chain chalkboard chandelier charcoal charger chess chest chisel cigar
clarinet clip clipboard cloak coat coffin collar comb compass container cooker cord corkscrew costume couch cradle
crate crayon crossbow crown crystal cube cup cupboard curtain cushion cutlery cutter dagger dart desktop detector
diamond dictionary dinghy dish dishwasher disk doll door doorbell drawer dress dresser drone dryer dustbin earring
easel elevator emerald engine envelope eraser extinguisher fabric faucet fence fiddle figurine filament filter
fireplace fixture flag flashlight flask flute folder fork fossil frame freezer fridge fryer funnel furnace gadget game
garment gate gear generator glass globe glove glue gong gown gramophone grater grill guitar gun hairbrush hammock
handbag handkerchief harness harp hat headphone hinge hoodie hook hose instrument iron jar jeans jersey jewel jug
juicer jumper keychain kimono kite knife label lace ladle lamppost lantern latch lawnmower leash lens letterbox lever
lid lighter lipstick lock locket loom luggage lute magazine magnet mailbox manuscript map marble marker mask mat
mattress medal medallion megaphone microphone mitten mixer monocle mop mortar motor mouse mug nail napkin necklace
needle net nightgown nozzle oar oboe ornament ottoman oven padlock paint paintbrush pajama pan panel parachute parasol
parcel pen pendant pendulum perfume photograph piccolo pipe pitcher plank plaster plate platter pliers plow plug
poncho poster pot pouch projector propeller pulley pump puppet purifier purse puzzle quilt quiver rack racket raft
rake razor receiver recorder reel refrigerator relic remote reservoir ribbon rifle ring robe rocker rocket rod rope
rosary rudder rug ruler saddle sail sandal satchel saucer saw saxophone scale scanner scissors scooter screw scroll
sculpture seat seatbelt shawl shears shelf shield shirt shoe shutter sieve sink skate skateboard ski slate sled sleeve
slipper snorkel sock socket spade spear spectacles spindle spoon spotlight spray sprinkler stamp statue stethoscope
stocking stool stove strap string stroller swimsuit sword syringe tambourine tap tape tapestry telephone thermometer
thimble thread tiara tie tile timer tire tongs tool toolbox toothbrush torch towel toy tractor trampoline transmitter
tray treadmill tripod trombone trophy trousers trumpet trunk tube tunic tuxedo typewriter uniform urn vacuum vehicle
veil velvet ventilator vest vial viola vise wagon wallet wallpaper wardrobe washer watch waterproof wheel wheelbarrow
wheelchair whistle wig wire wok wreath wrench xylophone yacht yarn zipper
""")

JOBS = listed("""
acrobat actor adviser ambassador announcer apprentice archaeologist archer archivist artist assistant astronomer
athlete attendant attorney auditor author banker barber barista bartender beekeeper biographer bishop blacksmith
boatman bodyguard bookkeeper botanist bouncer boxer brewer bricklayer broker builder butcher buyer cameraman captain
cardiologist caretaker cartoonist champion chancellor chaplain chauffeur chiropractor choreographer cleaner cleric
clerk coach cobbler colonel columnist comedian commander commentator composer conductor consultant contractor
controller cook coordinator coroner corporal counselor courier courtier critic curator cyclist dancer dealer dean
decorator demonstrator deputy dermatologist detective developer dietitian diplomat director dispatcher distributor
diver doctor dressmaker driver drummer ecologist economist educator entertainer entrepreneur envoy estimator evaluator
examiner executive explorer facilitator farmer filmmaker financier fireman fisherman forester general geographer
glazier goldsmith governor grocer groom guard guide hairdresser handyman harvester healer herbalist historian host
housekeeper hunter illustrator inspector instructor interpreter interviewer inventor investigator investor janitor
jeweler judge juggler laborer landlord landscaper lawmaker lecturer lieutenant lifeguard linguist lobbyist locksmith
logger machinist magician major manager marshal mason master mathematician mayor mentor merchant messenger
meteorologist midwife miner minister missionary model moderator monk musician narrator navigator negotiator
neurologist notary novelist nun nutritionist officer operator optician optometrist orator organist orthodontist
outfitter painter paramedic parliamentarian pastor patrolman pediatrician performer philosopher physician physicist
physiologist pianist planner playwright podiatrist poet policeman politician porter postman potter preacher president
priest principal printer private producer professor programmer promoter prosecutor psychiatrist psychologist publisher
radiologist rancher ranger realtor receptionist rector referee registrar reporter researcher restorer retailer rider
roofer sailor salesman scientist sculptor secretary sergeant server shepherd sheriff shopkeeper silversmith singer
smith sociologist soldier solicitor spokesman spy statistician steward stockbroker storekeeper strategist student
stylist superintendent supervisor surveyor swimmer technician teller theologian trader trainee trainer treasurer
trooper trustee tutor typist undertaker urologist usher valet vendor vicar waiter warden warrior watchmaker watchman
weaver welder wholesaler winemaker woodcutter wrestler writer zoologist
""")

COMMON = listed("""
abandon ability able absence absolute abstract abundant academic accent accident accurate achieve acid active actual
address adequate admire adventure advice afternoon age agency agenda agreement air alarm alive alone alphabet amazing
ancient angle ankle anniversary anonymous answer anxious apartment appetite applause apple appointment approach
approval april apron arch area argument army arrival arrow article ash aspect asset athletic atom attempt attention
attic attitude attractive audience aunt authentic automatic autumn avenue average award aware awkward back bacteria
balance balcony bamboo band bank bar bargain bark barn barrier base basement basic basin battle bay beach beam bean
bear beard beast beat beauty bed beef beer beetle beginner beginning behavior being belief berry best beyond big bill
biography bird birth biscuit bitter blade blast blind block blood bloom blossom blow body bold bomb bone bonus boom
booth border bother bottom bounce boundary boy brain branch brand brass brave bread breakfast breath breeze brewery
bridge brief broad bronze brook brother brown bubble bud buddy budget bug building bulk bull bunch bundle burden
burial burst bush business butter butterfly cabbage cake calendar calm camp campaign canal candidate candy capital
captive caravan carbon career careful carpet carrot casual cat catch category cathedral cattle cause caution cave
celebration cell center central century ceremony certain chalk champion chance change channel chaos chapter character
charge charity charm chase cheap cheek cheese cherry chicken chief childhood chin chip chocolate choice chorus
chronicle church circle circus civil claim clarity classic clay clean clear clever client cliff climate climb clinic
close closet cloth cloud clown clue cluster coal coast code coffee coin cold collar collection college colony column
comedy comet comfort command comment commerce committee common companion comparison competition complaint complete
complex concept concern concert conclusion concrete condition conference confidence conflict confusion congress
connection conscience consensus constant consumer contact contest context continent contract contrast contribution
convention conversation cookie copper copy core corn corner costume cottage cotton cough council country couple
courage cousin cover cow crab craft crash crazy cream creation creature credit creek crew cricket crime crisis crisp
critical crop cross crowd cruel crystal culture curious currency current curve custom cycle dairy damage dance danger
dark data daughter dawn day dead deal dear death debate debt decade decision decline decoration deep deer defeat
defense definition degree delay delicate delight delivery demand density departure dependent deposit depth descent
description desert desire destiny detail determination device dialogue diamond diet difference difficult digital
dignity dimension dinner diplomatic direct direction disaster discipline discovery discussion disease display dispute
distance distinct district diversity divine document dog dolphin domestic donkey doubt dozen dragon drama dream drift
drive drop drought dry duck duel dull dust duty dwarf dynamic eager eagle ear early earth ease east easy echo economy
edge editorial education effect effort egg elaborate elastic elbow elder election electric elegant element elephant
elite embassy emergency emotion emperor empire empty encounter end enemy energy enormous ensemble enterprise
entertainment enthusiasm entire entrance environment episode equal equipment era error escape essay essence estate
eternal ethical evening event every evidence evil evolution example excellent exception excess exchange exciting
exercise exile existence exit exotic expansion expedition expensive experience experiment expert explosion exposure
express extension extra extreme eye fabulous face facility fact factor faculty failure fair fairy faith falcon false
fame family famous fancy fantasy farm fashion fast fate father fatigue favor fear feast feather feature federal fellow
female fever fiction field fierce fifth fight figure film final finance fine finger finish fire firm first fish
fitness flame flash flat flavor flesh flexible flight float flock flood floor flour flow flower fluid fly focus fog
fold folk following foot force foreign forest form forward foundation fountain fox fraction fragile fragment frame
free freedom freight frequent fresh friction frog front frontier frost frozen fruit fuel full fun function fund funny
fur furniture fusion future galaxy gallery gang garage garlic gas gasoline gate gathering gender general generation
generous genius genre gentle gentleman genuine geography geometry ghost giant gift ginger girl glacier glad glamour
glimpse global glory glow goal goat gold golf goose gorgeous gossip government gradual grain grammar grand graph grass
grave gravity great greed greeting grid grief grocery ground group growth guarantee guardian guess guest guidance
guilt gulf guy gym habit hair half halfway hall ham hand handle happy harbor hard harmony harvest hate hazard headline
health heart heat heaven heavy hedge height heir helicopter hell herb heritage hero hesitant high highway hint hip
history hobby hockey hole holiday hollow holy home honest honey hope horizon horn horror horse hospital hostile hotel
hour house household huge human humble humor hungry hurricane hurry husband hybrid ice idea ideal identity ill illegal
illusion image imagination immediate immense immune impact imperial import impossible impressive impulse incident
income incredible independent index industry infant infinite inflation influence ink inner innocent innovation inquiry
insect inspiration instant instinct institution insurance intense interest interior internal international interval
intimate intuition invasion investment invisible irony island isolation ivory jacket jail jazz jealous jelly join
joint joke journey joy judge judgment juice jump jungle junior justice keep kick kid kidney kind kingdom kiss kitchen
knee knot knowledge lab labor ladder lake lamb land language laser last late latitude laugh laundry law lawn layer
lazy lead leaf league learning leather lecture left leg legacy legal legend leisure lemon length lesson letter level
liberal liberty library license lifetime lift light lightning likely limb limited line linen link lion liquid list
literary little lively living lizard loan lobby lobster local location log logic lonely long loose lord loss lottery
loud lounge love low loyal loyalty lucky lunch lung luxury lyric machine mad magic magnetic maid mail main mainland
major majority male mammal mandate maple marathon march margin marine maritime mark market marriage married marsh
marvelous mass master masterpiece material mathematics matrix mature maximum mayor maze meadow meal meaning measure
meat mechanism medal media medical medicine medium meeting melody melon member memory mental mention mercy merit
message metal method middle migration mild military milk mill mind mineral miniature minimum ministry minor minute
miracle mirror misery mission mist mixed mobile mode modern modest molecule moment monastery money monkey monster
month monument mood moon moral morning mortal mosaic mosquito moss motel mother motion motive mountain mouth move
movement movie multiple municipal murder muscle museum mushroom music mutual mystery myth nail naked name narrative
narrow nasty nation native natural navy near neat necessary neck neglect neighbor nephew nerve nest neutral new news
newspaper nice niece night nightmare noble noise nomination nominee norm normal north nose note notice notion novel
nuclear number nurse nut nutrition oak oath object obstacle obvious occasion ocean odd offense offer official oil old
olive omega onion open opera operation opinion opponent opportunity opposite oral orange orbit orchard orchestra order
organ organic origin orphan outcome outer outfit outlook output outside oval overseas owl oxygen oyster package page
pain palace palm panel panic panther paper parade paradise paragraph parallel parent parish park parliament part
partial participant partner passage passenger passion passive past paste pastry patch patent path patience pattern
pause payment peace peak peanut pearl peasant pepper perception perfect performance period permanent permission person
perspective phase philosophy photo phrase physical piece pig pilgrim pine pink pioneer pirate pizza place plague plain
planet plant plastic plateau platform play plaza pleasure plot plus pocket poem poetry point poison polar pole polish
political pond pony pool poor popular porch portion portrait position positive possession possibility possible potato
poverty powder power prairie praise prayer precise prediction preference premier premise preparation presence present
presentation pressure prestige previous pride primary primitive prince principle print priority prison privacy private
prize probable problem procedure process produce profession profile profit program progress prominent promise
promotion proof proper property prophet proportion proposal prose prospect protection protein protest protocol proud
proverb province provision psychology public publication pull pumpkin punch punishment pupil pure purple purpose push
puzzle pyramid quality quarrel quarter queen quest question quick quiet quiz quota rabbit racial radiation radical
rage rail railway rain rainbow ranch random range rapid rare rat rate raven raw ray reaction reader ready reality
realm reason rebel receipt reception recipe recognition record recovery recreation reduction reference reform refuge
region regret regular rehearsal reign rejection relation relative release relevant reliable relief religion remarkable
remedy reminder remote rental replacement representative republic reputation request rescue research reserve residence
resident resistance resolution resort resource respect response responsible rest restaurant result retail retirement
return revenge revenue reverse review revolution reward rhyme rhythm ribbon rice rich rider ridge rifle right ritual
rival river road robust rock roll romance romantic roof room root rotation rough round route routine royal rubber rude
rugby ruin rule rumor run rural sacred sacrifice sad safe saint salad sale salmon salt same sample sanctuary satellite
satisfaction sauce sausage savage scandal scarce scenario scene schedule scheme scholar scholarship school science
scope score scream script sculpture sea season second secret secure seed segment selection self senate senior
sensation sense sensitive sentence sentiment separate sequence series serious servant session settlement severe shade
shadow shake shallow shame shape share shark sharp sheep shell shelter shield shift shine shiny shock shop shore short
shortage shot shoulder show shower shrimp shrine shut sibling sick side siege sight sign signal signature significance
silence silent silk silly similar simple sincere sister situation size sketch skill skin skirt skull sky slave sleep
slice slight slip slogan slope slow small smart smash smell smile smoke smooth snack snake sneeze snow soap soccer
social society socket soft solar sole solid solution son song sophisticated sore sorry soul soup source south southern
sovereign space spark special spectacular spectrum speech speed spell spice spicy spider spin spiritual spite splendid
spoken sponge spontaneous sport spot spring squad square squirrel stability stable stadium staff stage stake stance
standard star start state statement station statistics status steak steam steel steep stem step stereo steward stick
stiff still stimulus stitch stock stomach stop store storm story strange strategy strawberry stream street strength
stress stretch strict strike strong structure studio stupid style subject submarine substance suburb success
succession sudden sufficient sugar suit suitable summer sun sunny sunrise sunset super superb superior supper support
supreme surface surgery surprise survey survival suspect suspicion sustainable swamp swan sweat sweet swift swim swing
switch symbol sympathy symphony symptom syndrome syrup system tactic tail tale talent talk tank target task taste taxi
tea teaching tear technique technology teenager temper temperature temple temporary tendency tennis tension tent term
terrible territory terror test text texture theater theme theory therapy thick thief thin thirst thorough thought
thousand threat throne thunder tide tiger tight time tin tiny tired tissue title tobacco toe together tomato tomorrow
ton tone tongue tooth top topic tornado total touch tough tour tourist tournament tower town trace trade tradition
traffic tragedy trail transition transport trap trauma travel treasure treat treatment treaty tree trend trial
triangle tribe tribute trick trim trip triumph tropical trouble true trust truth tune tunnel turkey turn turtle twin
twist typical ultimate umpire uncle under understanding union unique unit universal universe university unknown
unusual upper urban urge urgent useful utility vacation vaccine vague valid valley value vampire vanilla variable
variation variety vast vegetable verse vessel veteran victim victory video view vigorous village vintage violence
virtual virtue virus visible vision visit visual vital vivid vocabulary voice volcano volume voluntary vote voyage
wage wagon walk wall war warm warning warrior wash waste water waterfall wave wax weak wealth weapon weather wedding
weed week weekend weight weird welcome welfare wet whale wheat whiskey whisper white whole wicked wide widow wife wild
wilderness willing wind window wing winter wire wisdom wise wish witch witness wizard wolf woman wonder wool word work
workshop world worm worry worship worth wound wrap wrist writing wrong yard year yellow yesterday yoga young youth
zebra zero zone
""")
